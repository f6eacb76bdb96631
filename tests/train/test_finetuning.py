"""Whole runs of fine-tuning: what they write, that they can be stopped, and that parts do not matter."""

import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from tiny import tiny_tokenizer

from litgpt.__main__ import main
from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.load import load_model
from litgpt.data import JSON
from litgpt.finetune import adapter, adapter_v2, full, lora

SETUPS = {"full": full.setup, "lora": lora.setup, "adapter": adapter.setup, "adapter_v2": adapter_v2.setup}
SUFFIXES = {"full": "", "lora": ".lora", "adapter": ".adapter", "adapter_v2": ".adapter_v2"}
TRAIN = TrainArgs(save_interval=2, global_batch_size=4, micro_batch_size=2, lr_warmup_steps=1, max_steps=6, epochs=5)
EVAL = EvalArgs(interval=2, max_iters=2, max_new_tokens=4)
RATE = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
SIDE_FILES = {
    "model_config.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "hyperparameters.yaml",
    "prompt_style.yaml",
}


def run(method, checkpoint_dir, out_dir, json_path, train=TRAIN, **options):
    data = JSON(json_path, val_split_fraction=0.2)
    SETUPS[method](
        checkpoint_dir,
        out_dir=out_dir,
        data=data,
        train=train,
        eval=EVAL,
        optimizer=RATE,
        precision="32-true",
        **options,
    )
    return torch.load(out_dir / "final" / f"lit_model.pth{SUFFIXES[method]}", weights_only=True)["model"]


@pytest.mark.parametrize("method", SETUPS)
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(method, checkpoint_dir, tmp_path, json_path, capsys):
    expected = run(method, checkpoint_dir, tmp_path / "whole", json_path)
    half = tmp_path / "half"
    run(method, checkpoint_dir, half, json_path)
    for folder in ("final", "step-000006", "step-000004"):  # as a run killed after step 2 or 3 leaves it
        shutil.rmtree(half / folder)
    capsys.readouterr()
    resumed = run(method, checkpoint_dir, half, json_path, resume="auto")
    assert resumed.keys() == expected.keys()
    for name in expected:
        assert torch.equal(resumed[name], expected[name]), name
    assert capsys.readouterr().out.count("(step)") == 4


@pytest.mark.parametrize("method", SETUPS)
def test_what_a_run_writes_and_says(method, checkpoint_dir, tmp_path, json_path, capsys):
    out = tmp_path / "out"
    run(method, checkpoint_dir, out, json_path)
    weights = f"lit_model.pth{SUFFIXES[method]}"
    assert {folder.name for folder in out.iterdir()} == {"step-000002", "step-000004", "step-000006", "final", "logs"}
    for folder in out.glob("step-*"):
        assert {file.name for file in folder.iterdir()} - {"generation_config.json"} == {weights, *SIDE_FILES}
    merged = {"lit_model.pth"} if method == "lora" else set()
    assert {file.name for file in (out / "final").iterdir()} - {"generation_config.json"} == {
        weights,
        *SIDE_FILES,
        *merged,
    }
    assert (out / "logs" / "csv" / "version_0" / "metrics.csv").is_file()
    assert "<polyline" in (out / "logs" / "loss.svg").read_text()
    text = capsys.readouterr().out
    assert text.count("(step)") == 6
    assert text.count("val loss") == 3 + 1
    assert text.count("Final evaluation") == 1
    assert "Number of trainable parameters: " in text
    values = yaml.safe_load((out / "final" / "hyperparameters.yaml").read_text())
    assert values["data"]["class_path"] == "litgpt.data.JSON"
    assert values["train"]["max_steps"] == 6


def test_training_learns(checkpoint_dir, tmp_path, json_path, capsys):
    run(
        "full", checkpoint_dir, tmp_path / "out", json_path, replace(TRAIN, max_steps=40, epochs=50, save_interval=None)
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "(step)" in line]
    losses = [float(line.split("loss train: ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(("accumulation", "pack"), [(2, False), (1, False), (1, True)])
def test_every_counted_token_weighs_the_same_however_a_step_is_cut(
    accumulation, pack, checkpoint_dir, tmp_path, json_path
):
    """The weights after a step on all samples do not depend on micro-batches or packing."""
    whole = replace(TRAIN, max_steps=2, global_batch_size=16, micro_batch_size=16, save_interval=None)
    expected = run("full", checkpoint_dir, tmp_path / "whole", json_path, whole)
    size = 16 // accumulation
    cut = replace(whole, micro_batch_size=size, pack=pack)
    found = run("full", checkpoint_dir, tmp_path / "cut", json_path, cut)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_merged_model_is_the_tuned_one(checkpoint_dir, tmp_path, json_path):
    weights = run("lora", checkpoint_dir, tmp_path / "out", json_path, lora_mlp=True, lora_head=True)
    base, merged = load_model(checkpoint_dir).state_dict(), load_model(tmp_path / "out" / "final").state_dict()
    name = "transformer.h.0.mlp.proj"
    product = weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"] * 2.0
    assert product.abs().max() > 1e-3
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + product)


def test_old_checkpoints_go_and_the_best_one_stays(checkpoint_dir, tmp_path, json_path):
    out = tmp_path / "out"
    run("lora", checkpoint_dir, out, json_path, replace(TRAIN, keep_last=1, save_interval=1))
    steps = sorted(folder.name for folder in out.glob("step-*"))
    assert steps[-1] == "step-000006"
    assert len(steps) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": replace(TRAIN, global_batch_size=5)}, "global_batch_size=5 must be a multiple"),
        ({"train": replace(TRAIN, max_seq_length=10_000)}, "max_seq_length=10000 is more than the model's context"),
        ({"train": replace(TRAIN, epochs=None, max_steps=None)}, "how long to train"),
        ({"precision": "8-bit"}, "precision '8-bit' is not one of"),
        ({"optimizer": "Adamm"}, "optimizer 'Adamm' does not exist"),
        ({"optimizer": {"class_path": "AdamW", "init_args": {"speed": 1}}}, "does not take speed"),
        ({"logger_name": "paper"}, "logger_name 'paper' is not one of"),
        ({"devices": 0}, "devices must be a positive number"),
        ({"resume": True}, "holds no checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(options, message, checkpoint_dir, tmp_path, json_path):
    out = tmp_path / "out"
    arguments = {"train": TRAIN, "eval": EVAL, "precision": "32-true"} | options
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lora.setup(checkpoint_dir, out_dir=out, data=JSON(json_path, val_split_fraction=0.2), **arguments)
    assert not list(out.glob("*/*.yaml"))


def test_a_folder_that_holds_a_run_is_not_overwritten(checkpoint_dir, tmp_path, json_path):
    out = tmp_path / "out"
    run("lora", checkpoint_dir, out, json_path)
    with pytest.raises(ValueError, match="holds a run already"):
        run("lora", checkpoint_dir, out, json_path)
    with pytest.raises(FileNotFoundError, match=r"step-\*/lit_model.pth"):
        run("full", checkpoint_dir, out, json_path, resume=True)


def test_both_warm_ups_are_refused():
    with pytest.raises(ValueError, match="not both"):
        TrainArgs(lr_warmup_steps=3, lr_warmup_fraction=0.1)


def test_samples_and_answers_of_a_conversation_are_what_is_learned():
    from litgpt.data.encoding import encode_sample
    from litgpt.prompts import ChatTemplate

    tokenizer = tiny_tokenizer()
    style = ChatTemplate.from_tokenizer(tokenizer)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No more."},
    ]
    ids, counted, _ = encode_sample({"messages": messages}, tokenizer, style)
    assert tokenizer.decode(ids.tolist()) == "HiHello.And?No more."
    text = "".join(tokenizer.id_to_token(i) or "" for i in ids.tolist())
    assert text == style.render(messages, add_generation_prompt=False).replace(" ", "Ġ")
    said = "".join(tokenizer.id_to_token(i) for i in ids[counted].tolist())
    assert said == "Hello.<|end|>Noĉmore.<|end|>".replace("ĉ", "Ġ")


def test_the_command_line_gives_every_option(checkpoint_dir, tmp_path, json_path):
    out = tmp_path / "out"
    arguments = f"""finetune_lora {checkpoint_dir} --out_dir {out} --data JSON --data.json_path {json_path}
        --data.val_split_fraction 0.2 --data.mask_prompt true --train.max_steps 1 --train.global_batch_size 2
        --train.micro_batch_size 1 --train.lr_warmup_steps 0 --eval.max_iters 1 --lora_r 4 --lora_mlp true
        --optimizer AdamW --optimizer.init_args.lr 0.01 --precision 32-true"""
    assert main(arguments.split()) == 0
    values = yaml.safe_load((out / "final" / "hyperparameters.yaml").read_text())
    assert values["data"]["init_args"]["mask_prompt"] is True
    assert values["lora_r"] == 4
    again = tmp_path / "again"  # the file reproduces the run
    assert (
        main(["finetune_lora", "--config", str(out / "final" / "hyperparameters.yaml"), "--out_dir", str(again)]) == 0
    )
    weights = [torch.load(x / "final" / "lit_model.pth.lora", weights_only=True)["model"] for x in (out, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
