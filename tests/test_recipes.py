"""Recipes of config_hub: every file parses, and says what the table of recipes says."""

import csv
import json
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from litgpt.__main__ import COMMANDS, parse
from litgpt.data import Alpaca2k

ROOT = Path(__file__).parents[1]
HUB = ROOT / "config_hub"
with open(ROOT / "tests" / "data" / "finetune_recipes.csv", encoding="utf-8") as file:
    TABLE = list(csv.DictReader(file))
PRETRAIN = json.loads((ROOT / "tests" / "data" / "pretrain_recipes.json").read_text("utf-8"))
HERE = [*(HUB / "finetune" / "smollm2-135m").glob("*.yaml"), HUB / "pretrain" / "text.yaml"]
TARGETS = {"q": "query", "k": "key", "v": "value", "p": "projection", "m": "mlp", "h": "head"}


def read(path):
    if path.parents[1].name == "finetune":
        command = "finetune_full" if path.stem == "full" else "finetune_lora"
    else:
        command = "pretrain"
    module, _, attribute = COMMANDS[command][0].partition(":")
    return parse(command, getattr(import_module(module), attribute), ["--config", str(path)])


@pytest.mark.parametrize("row", TABLE, ids=[row["file"] for row in TABLE])
def test_finetune_recipe_is_that_of_the_table(row):
    given = read(HUB / "finetune" / row["file"])
    train, data = given["train"], given["data"]
    assert str(given["checkpoint_dir"]) == row["checkpoint"]
    assert given["devices"] == int(row["devices"])
    assert given.get("quantize") == (row["quantize"] or None)
    if row["r"]:
        numbers = given["lora_r"], given["lora_alpha"], given["lora_dropout"]
        assert numbers == (int(row["r"]), int(row["alpha"]), float(row["dropout"]))
        assert {letter for letter, name in TARGETS.items() if given[f"lora_{name}"]} == set(row["targets"])
    for name in ("global_batch_size", "micro_batch_size", "epochs", "max_steps", "save_interval"):
        assert getattr(train, name) == (int(row[name]) if row[name] else None), name
    assert (train.lr_warmup_steps, train.max_seq_length, train.log_interval) == (int(row["warmup"]), 512, 1)
    assert given["eval"].interval == int(row["eval_interval"])
    assert (given["eval"].max_new_tokens, given["eval"].max_iters, given["eval"].final_validation) == (100, 100, True)
    assert given["optimizer"]["class_path"] == "torch.optim.AdamW"
    rates = {"lr": float(row["lr"]), "weight_decay": float(row["weight_decay"]), "betas": [0.9, 0.95]}
    assert given["optimizer"]["init_args"] == rates
    assert type(data) is Alpaca2k
    assert (data.mask_prompt, data.seed, data.val_split_fraction) == (
        False,
        42,
        float(row["val_split_fraction"] or 0.05),
    )
    assert (given["precision"], given["logger_name"], given["seed"]) == ("bf16-true", "csv", 1337)


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretrain_recipe_is_that_of_the_table(name):
    given, row = read(HUB / "pretrain" / f"{name}.yaml"), PRETRAIN[name]
    assert given["model_name"] == row["model_name"]
    assert type(given["data"]).__name__ == row["data"]
    assert {key: getattr(given["train"], key) for key in row["train"]} == row["train"]
    assert given["eval"].interval == row["eval_interval"]
    assert given["optimizer"]["init_args"] == {"lr": row["lr"], "weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert (str(given["tokenizer_dir"]), given["logger_name"]) == (row["tokenizer_dir"], row["logger_name"])
    assert (given["precision"], given["devices"], given["seed"]) == ("bf16-mixed", "auto", 42)
    assert (given["train"].max_norm, given["train"].save_interval, given["resume"]) == (1.0, 1000, False)


@pytest.mark.parametrize("path", HERE, ids=lambda path: path.stem)
def test_recipe_for_the_small_model_parses(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "conversations.jsonl").write_text("{}")
    assert read(path)["train"].max_seq_length in (512, 1024)


def test_every_recipe_is_in_a_table():
    named = {HUB / "finetune" / row["file"] for row in TABLE} | {HUB / "pretrain" / f"{name}.yaml" for name in PRETRAIN}
    assert named | set(HERE) == {*HUB.glob("finetune/*/*.yaml"), *HUB.glob("pretrain/*.yaml")}


def test_recipes_say_only_what_is_not_the_default():
    for path in HUB.glob("finetune/*/*.yaml"):
        train = yaml.safe_load(path.read_text("utf-8"))["train"]
        defaults = {"save_interval": 1000, "global_batch_size": 16, "micro_batch_size": 1, "epochs": 5}
        assert not train.items() & defaults.items(), path
