"""Whole runs of fine-tuning: what they write, that they can be stopped, and that parts do not matter."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.loggers import Logger
from lightning.fabric.plugins.precision import Precision
from tiny import tiny_tokenizer
from torch.utils.data import DataLoader

from litgpt import pretrain
from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.finetuned import Finetuned
from litgpt.checkpoint.load import load_finetuned, load_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config
from litgpt.data import JSON, DataModule
from litgpt.finetune import adapter, adapter_v2, full, lora
from litgpt.kvcache import CacheSpec
from litgpt.scripts.quantize import quantize_checkpoint
from litgpt.train import finetune, loop, setting
from litgpt.train.loop import Loop
from litgpt.train.run import Run

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

COLUMNS = [
    "batches",
    *(f"device/{name}_per_sec" for name in ("batches", "items", "samples")),
    "epoch",
    "iter",
    "iter_time",
]
COLUMNS += [
    "learning_rate",
    "lengths",
    "loss",
    "samples",
    "step",
    "time",
    "tokens",
    "total_tokens",
    "val_loss",
    "val_ppl",
]


def run(method, checkpoint_dir, out_dir, json_path, train=TRAIN, eval=EVAL, **options):
    data = JSON(json_path, val_split_fraction=0.2)
    SETUPS[method](
        checkpoint_dir,
        out_dir=out_dir,
        data=data,
        train=train,
        eval=eval,
        optimizer=RATE,
        precision="32-true",
        **options,
    )
    return torch.load(out_dir / "final" / f"lit_model.pth{SUFFIXES[method]}", weights_only=True)["model"]


@pytest.mark.parametrize("method", SETUPS)
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(method, checkpoint_dir, tmp_path, json_path, capsys):
    expected = run(method, checkpoint_dir, tmp_path / "whole", json_path)
    half = shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for folder in ("final", "step-000006", "step-000004"):  # as a run killed after step 2 or 3 leaves it
        shutil.rmtree(half / folder)
    (half / ".step-000003.01234567.new.tmp").mkdir()
    capsys.readouterr()
    resumed = run(method, checkpoint_dir, half, json_path, resume="auto")
    assert not list(half.glob(".*"))
    assert resumed.keys() == expected.keys()
    for name in expected:
        assert torch.equal(resumed[name], expected[name]), name
    assert capsys.readouterr().out.count("(step)") == 4
    pictures = [(tmp_path / name / "logs" / "loss.svg").read_text() for name in ("whole", "half")]
    assert pictures[0] == pictures[1]  # with the losses from before


def test_the_scale_of_losses_is_resumed_too(checkpoint_dir, tmp_path, json_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(Precision, "state_dict", lambda self: {"scale": 512.0})  # as that of 16-mixed on a GPU
    monkeypatch.setattr(Precision, "load_state_dict", lambda self, state: loaded.append(state))
    run("lora", checkpoint_dir, tmp_path, json_path, replace(TRAIN, max_steps=2))
    shutil.rmtree(tmp_path / "final")
    run("lora", checkpoint_dir, tmp_path, json_path, replace(TRAIN, max_steps=3), resume=True)
    assert loaded == [{"scale": 512.0}]


@pytest.mark.parametrize("method", SETUPS)
def test_what_a_run_writes_and_says(method, checkpoint_dir, tmp_path, json_path, capsys, caplog):
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
    columns = (out / "logs" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert columns.split(",") == COLUMNS
    assert "<polyline" in (out / "logs" / "loss.svg").read_text()
    text = capsys.readouterr().out
    assert text.count("(step)") == 6
    assert text.count("val loss") == 3 + 1
    assert text.count("Final evaluation") == 1
    assert "Number of trainable parameters: " in text
    assert text.count("Validating ...") == 3 + 1
    assert "Number of epochs" not in text
    assert text.count(f"Saving {'adapter weights' if 'adapter' in method else 'checkpoint'} to '{out}/step-") == 3
    assert "Seed set to 1337" in caplog.text
    longest = r"longest sequence length in the train data is (\d+), the model's maximum sequence length is \1 and context length is 512"
    assert re.search(longest, text)
    values = yaml.safe_load((out / "final" / "hyperparameters.yaml").read_text())
    assert values["data"]["class_path"] == "litgpt.data.JSON"
    assert values["train"]["max_steps"] == 6


class Recorder(Logger):
    name, version, root_dir = "recorder", 0, None

    def __init__(self) -> None:
        self.settings, self.losses, self.end = [], [], None

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.settings.append(params)

    def log_metrics(self, metrics, step=None) -> None:
        self.losses += [metrics["loss"]] if "loss" in metrics else []

    def finalize(self, status) -> None:
        self.end = status


def test_loggers_get_settings_losses_and_how_a_run_ended(checkpoint_dir, tmp_path, json_path, monkeypatch):
    logger = Recorder()
    monkeypatch.setattr(setting, "make_logger", lambda *args: logger)
    run("lora", checkpoint_dir, tmp_path / "out", json_path, replace(TRAIN, max_steps=2, save_interval=None))
    assert [settings["train"]["max_steps"] for settings in logger.settings] == [2]
    assert (len(logger.losses), logger.end) == (4, "success")  # of micro-batches
    monkeypatch.setattr(Run, "save_final", lambda self: (tmp_path / "out").mkdir())
    with pytest.raises(FileExistsError):
        run("lora", checkpoint_dir, tmp_path / "another", json_path, replace(TRAIN, max_steps=1, save_interval=None))
    assert logger.end == "failed"


def test_a_run_that_ends_with_its_last_epoch_says_so(checkpoint_dir, tmp_path, json_path, capsys):
    train = replace(TRAIN, max_steps=None, epochs=1, save_interval=None)
    run("adapter", checkpoint_dir, tmp_path / "out", json_path, train, EvalArgs(interval=9, max_iters=1))
    assert "Number of epochs 1 reached, stopping training..." in capsys.readouterr().out


def test_an_adapter_begins_where_the_checkpoints_own_config_says(checkpoint_dir, tmp_path, json_path):
    folder = Path(shutil.copytree(checkpoint_dir, tmp_path / "checkpoint"))
    with open(folder / "model_config.yaml", "a") as file:
        file.write("adapter_start_layer: 1\nadapter_prompt_length: 3\n")
    trained = run("adapter", folder, tmp_path / "out", json_path, replace(TRAIN, max_steps=1, save_interval=None))
    prefixes = {name: len(x) for name, x in trained.items() if "adapter_wte" in name}
    assert min(prefixes).startswith("transformer.h.1.")
    assert set(prefixes.values()) == {3}


class Stream(DataLoader):
    """A loader that does not know how many batches there are."""

    def __init__(self, loader) -> None:
        super().__init__(loader.dataset, batch_sampler=loader.batch_sampler)

    def __len__(self) -> int:
        raise TypeError("a stream")


class Rows(DataModule):
    """Rows of two tokens, by a module that is made elsewhere."""

    shuffle, length = False, True

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self):
        rows = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 1, 2], [5, 6, 7], [1, 1, 1], [7, 3, 0]])
        loader = DataLoader(rows, self.batch_size, shuffle=self.shuffle)
        return loader if self.length else Stream(loader)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(("shuffle", "length"), [(True, True), (False, False)])
def test_a_run_on_a_module_made_elsewhere_is_resumed_exactly(shuffle, length, tmp_path):
    data, final = Rows(), Path("final") / "lit_model.pth"
    data.shuffle, data.length = shuffle, length
    config = Config(block_size=4, n_layer=1, n_embd=8, n_head=4, padded_vocab_size=8)
    train = TrainArgs(global_batch_size=1, micro_batch_size=1, max_steps=10, lr_warmup_steps=0, save_interval=2)
    options = {"model_config": config, "train": train, "eval": EvalArgs(interval=3, max_iters=1), "logger_name": "csv"}
    options |= {"devices": 1, "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}, "precision": "32-true"}
    pretrain.setup("pythia-14m", data=data, out_dir=tmp_path / "whole", **options)
    expected = torch.load(tmp_path / "whole" / final)["model"]
    for step in (2, 8):
        half = tmp_path / f"half-{step}"
        shutil.copytree(tmp_path / "whole" / f"step-{step:08d}", half / f"step-{step:08d}")
        pretrain.setup("pythia-14m", data=data, out_dir=half, resume=True, **options)
        found = torch.load(half / final)["model"]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pretraining_on_a_module_made_elsewhere_ends_with_its_tokens(tmp_path, capsys):
    config = Config(block_size=4, n_layer=2, n_embd=8, n_head=4, padded_vocab_size=8)
    train = TrainArgs(global_batch_size=2, max_tokens=16, save_interval=2, micro_batch_size=1, max_norm=1.0)
    options = {"model_config": config, "train": train, "eval": EvalArgs(interval=1, max_iters=1), "logger_name": "csv"}
    pretrain.setup("pythia-14m", data=Rows(), devices=1, out_dir=tmp_path / "out", **options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"step-00000002", "step-00000004", "final", "logs"}
    text = capsys.readouterr().out
    for line in (
        "Time to instantiate model: ",
        "Total parameters: 1,888",
        "Measured TFLOPs: ",
        "remaining time: 0:00:00",
    ):
        assert line in text


def test_training_learns(checkpoint_dir, tmp_path, json_path, capsys):
    train = replace(TRAIN, max_steps=40, epochs=50, save_interval=None)
    run("full", checkpoint_dir, tmp_path / "out", json_path, train, EvalArgs(interval=50, max_iters=1))
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


@pytest.mark.parametrize(("limit", "steps"), [({"max_time": 1e-9}, 1), ({"max_tokens": 2000}, 2)])
def test_time_and_tokens_are_limits_too(limit, steps, checkpoint_dir, tmp_path, json_path, capsys):
    run(
        "lora", checkpoint_dir, tmp_path / "out", json_path, replace(TRAIN, max_steps=None, save_interval=None, **limit)
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "(step)" in line]
    assert len(lines) == steps


def test_the_merged_model_is_the_tuned_one(checkpoint_dir, tmp_path, json_path):
    weights = run("lora", checkpoint_dir, tmp_path / "out", json_path, lora_mlp=True, lora_head=True)
    base, merged = load_model(checkpoint_dir).state_dict(), load_model(tmp_path / "out" / "final").state_dict()
    name = "transformer.h.0.mlp.proj"
    product = weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"] * 2.0
    assert product.abs().max() > 1e-3
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + product)


@pytest.mark.parametrize(
    ("save_interval", "losses", "kept"),
    [
        (
            1,
            [9.0, 3.0, 1.0, 2.0, 2.0],
            ["000004", "000006"],
        ),  # the first is of the check before training, the last of the end
        (3, [9.0, 3.0, 1.0, 2.0, 4.0, 4.0], ["000006", "000009"]),  # step 4 was better, and not saved
        (5, [9.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0], ["000010"]),
    ],
)
def test_old_checkpoints_go_and_the_best_one_stays(
    save_interval, losses, kept, checkpoint_dir, tmp_path, json_path, monkeypatch
):
    left = iter(losses)
    monkeypatch.setattr(loop, "validate", lambda *args: next(left))
    train = replace(TRAIN, keep_last=1, save_interval=save_interval, max_steps={1: 6, 3: 9, 5: 10}[save_interval])
    run("lora", checkpoint_dir, tmp_path / "out", json_path, train)
    assert sorted(folder.name.removeprefix("step-") for folder in (tmp_path / "out").glob("step-*")) == kept
    assert list(left) == []


def test_a_run_stops_when_validation_no_longer_gets_better(checkpoint_dir, tmp_path, json_path, capsys, monkeypatch):
    losses = iter([9.0, 3.0, 2.0, 2.5, 2.1, 1.0, 1.0])  # the first is of the check before training, the last of the end
    monkeypatch.setattr(loop, "validate", lambda *args: next(losses))
    train = replace(TRAIN, early_stopping=2, save_interval=None, max_steps=100, epochs=100)
    run("lora", checkpoint_dir, tmp_path / "out", json_path, train)
    assert capsys.readouterr().out.count("(step)") == 8  # a validation every 2 steps: the third and fourth were worse


def test_a_disk_that_is_full_while_saving_leaves_the_last_checkpoint(checkpoint_dir, tmp_path, json_path, monkeypatch):
    out = tmp_path / "out"
    save = torch.save

    def full(content, path):
        save(content, path)
        if content.get("step_count") == 4:
            path.write_bytes(path.read_bytes()[:100])
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")  # what torch says

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            OSError,
            match=r"step-000004 could not be written whole: the disk of .*last complete checkpoint is .*step-000002",
        ):
            run("lora", checkpoint_dir, out, json_path)
    assert {path.name for path in out.iterdir()} == {"step-000002", "logs"}
    resumed = run("lora", checkpoint_dir, out, json_path, resume="auto")
    expected = run("lora", checkpoint_dir, tmp_path / "whole", json_path)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


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
        ({"devices": 0}, "devices must be .auto. or a positive integer"),
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
    with pytest.raises(ValueError, match="holds final of a run already: .* or --resume auto"):
        run("lora", checkpoint_dir, out, json_path)
    with pytest.raises(ValueError, match="holds final, and no checkpoint of this method to resume from"):
        run("full", checkpoint_dir, out, json_path, resume="auto")
    with pytest.raises(FileNotFoundError, match=r"step-\*/lit_model.pth"):
        run("full", checkpoint_dir, out, json_path, resume=True)
    with pytest.raises(ValueError, match="holds weights only; give the file of a step-"):
        run("lora", checkpoint_dir, tmp_path / "other", json_path, resume=out / "final")
    file = out / "step-000006" / "lit_model.pth.lora"
    torch.save(torch.load(file) | {"model_name": "other"}, file)
    with pytest.raises(ValueError, match="is of model_name='other', this run of 'tiny'"):
        run("lora", checkpoint_dir, out, json_path, resume="auto")


def test_both_warm_ups_are_refused():
    with pytest.raises(ValueError, match="both"):
        TrainArgs(lr_warmup_steps=3, lr_warmup_fraction=0.1)


def test_a_warm_up_as_long_as_the_run_is_a_warning():
    with pytest.warns(UserWarning, match=r"lr_warmup_steps \(100\) is not less than max_steps \(100\)"):
        TrainArgs(max_steps=100)


def test_samples_and_answers_of_a_conversation_are_what_is_learned():
    from litgpt.data.encoding import EncodedSamples
    from litgpt.prompts import ChatTemplate

    tokenizer = tiny_tokenizer()
    style = ChatTemplate.from_tokenizer(tokenizer)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No more."},
    ]
    ids, counted, _ = EncodedSamples.of([{"messages": messages}], tokenizer, style, "test")[0]
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
        --optimizer.class_path torch.optim.AdamW --optimizer.init_args.lr 0.01 --precision 32-true"""
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


def test_kinds_of_lora_are_options_and_what_they_train_is_understood(checkpoint_dir, tmp_path, json_path, capsys):
    out = tmp_path / "out"
    weights = run("lora", checkpoint_dir, out, json_path, lora_all=True, lora_rslora=True, lora_dora=True)
    final = out / "final"
    values = yaml.safe_load((final / "hyperparameters.yaml").read_text())
    assert {name: values[name] for name in values if name.startswith("lora_")} == {
        **{"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_query": True, "lora_key": True},
        **{"lora_value": True, "lora_projection": True, "lora_mlp": True, "lora_head": False},
        **{"lora_rslora": True, "lora_dora": True},
    }
    base, merged = load_model(checkpoint_dir).state_dict(), load_model(final).state_dict()
    name = "transformer.h.0.mlp.proj"
    A, B, m = (weights[f"{name}.lora_{kind}"] for kind in ("A", "B", "magnitude"))
    expected = base[f"{name}.weight"] + B @ A * (16 / 8**0.5)
    expected = m[:, None] * expected / expected.norm(dim=1, keepdim=True)
    assert not torch.allclose(expected, base[f"{name}.weight"], atol=1e-3)
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    loaded = load_finetuned(
        Finetuned(final, "lora"), open_checkpoint(checkpoint_dir), torch.float32, torch.device("cpu")
    )
    idx = torch.randint(0, 261, (1, 20))
    torch.testing.assert_close(loaded(idx), load_model(final)(idx), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantised_base_is_tuned_and_stays_as_it_is(mode, method, checkpoint_dir, tmp_path, json_path):
    out = tmp_path / "out"
    run(method, checkpoint_dir, out, json_path, replace(TRAIN, max_steps=2), quantize=mode)
    values = yaml.safe_load((out / "final" / "hyperparameters.yaml").read_text())
    assert values["quantize"] == mode
    if method == "lora":  # merged into the weights that were quantised on reading
        weights = torch.load(out / "final" / "lit_model.pth.lora")["model"]
        name = "transformer.h.0.attn.qkv"
        merged, base = (load_model(x).state_dict()[f"{name}.weight"] for x in (out / "final", checkpoint_dir))
        A, B = weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]
        rows = base.shape[0] // 2  # queries: half of all rows
        torch.testing.assert_close(merged[:rows], base[:rows] + 2 * B[:rows] @ A[:8])


def test_full_fine_tuning_of_quantised_weights_is_refused(checkpoint_dir, tmp_path, json_path):
    quantize_checkpoint(checkpoint_dir, tmp_path / "int8", quantize="int8")
    with pytest.raises(ValueError, match="full fine-tuning needs plain weights"):
        run("full", tmp_path / "int8", tmp_path / "out", json_path)
    llm = LLM.load(checkpoint_dir, distribute=None, quantize="int8")
    with pytest.raises(ValueError, match="full fine-tuning needs plain weights"):
        finetune(llm, json_path, "full")


@pytest.mark.parametrize("mode", ["bnb.nf4", "bnb.int8-training"])
def test_formats_that_need_a_gpu_say_so(mode, checkpoint_dir, tmp_path, json_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=f"quantize='{mode}' needs a GPU"):
        run("lora", checkpoint_dir, tmp_path / "out", json_path, quantize=mode)


# --- from Python

ANSWER = [{"instruction": "Who?", "output": "Me, always."}]


@pytest.fixture
def llm(checkpoint_dir):
    return LLM.load(checkpoint_dir, distribute=None)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"lora_all": True, "lora_head": True, "learning_rate": 0.01, "lora_dropout": 0.0}),
        ("lora", {"lora_all": True, "lora_head": True, "learning_rate": 0.01, "quantize": "int8"}),
        ("full", {"learning_rate": 0.01}),
        ("adapter_v2", {"learning_rate": 0.1}),
    ],
)
def test_an_llm_that_learned_one_answer_gives_it_at_once(method, options, checkpoint_dir):
    llm = LLM.load(checkpoint_dir, distribute=None, quantize=options.pop("quantize", None))
    before = llm.generate("Who?", temperature=0.0)
    metrics = finetune(llm, ANSWER, method, max_steps=40, epochs=100, global_batch_size=1, lr_warmup_steps=0, **options)
    assert metrics["steps"] == 40
    assert metrics["train_loss"] < 2
    assert before != "Me, always." == llm.generate("Who?", temperature=0.0)


def test_an_adapter_is_trained_from_python_and_leaves_the_llm_with_it(llm):
    metrics = finetune(llm, ANSWER, "adapter", max_steps=3, epochs=9, global_batch_size=1, learning_rate=0.1)
    assert metrics["steps"] == 3
    assert isinstance(llm.generate("Who?", max_new_tokens=3), str)
    with pytest.raises(ValueError, match="earlier fine-tuning"):
        finetune(llm, ANSWER)
    with pytest.raises(ValueError, match="saved separately"):
        llm.save("nowhere")


@pytest.mark.parametrize("source", ["samples", "path"])
def test_the_hyperparameters_of_a_run_from_python_repeat_it(source, llm, samples, json_path, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    data = samples if source == "samples" else json_path
    options = {"max_steps": 3, "lr_warmup_steps": 1, "global_batch_size": 4, "learning_rate": 0.01}
    finetune(llm, data, out_dir=out, val_split_fraction=0.2, lora_mlp=True, lora_value=False, **options)
    file = out / "final" / "hyperparameters.yaml"
    assert main(["finetune_lora", "--config", str(file), "--out_dir", str(again)]) == 0
    first, second = (torch.load(x / "final" / "lit_model.pth.lora")["model"] for x in (out, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    idx = torch.randint(0, 261, (1, 20))
    torch.testing.assert_close(llm.model(idx), load_model(again / "final")(idx), atol=1e-4, rtol=1e-4)


def test_a_run_that_is_interrupted_leaves_the_llm_usable_and_says_how_to_go_on(llm, tmp_path, capsys, monkeypatch):
    steps = []

    def interrupted(self, window):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(step(self, window))

    step = Loop._step
    monkeypatch.setattr(Loop, "_step", interrupted)
    before = {name: x.clone() for name, x in llm.state_dict().items()}
    options = {"global_batch_size": 1, "learning_rate": 0.01, "lr_warmup_steps": 0, "activation_checkpointing": True}
    with pytest.raises(KeyboardInterrupt):
        finetune(llm, ANSWER, epochs=10, out_dir=tmp_path, save_interval=2, **options)
    assert f"--resume auto goes on from {tmp_path / 'step-000002'}" in capsys.readouterr().out
    after = llm.state_dict()
    assert after.keys() == before.keys()
    changed = {name.rpartition(".attn.")[2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"qkv.weight"}  # what three steps learned is kept
    assert isinstance(llm.generate("Who?", max_new_tokens=3), str)
    assert not any("forward" in vars(block) for block in llm.model.transformer.h)


def test_a_group_of_options_and_single_ones_of_it_go_together(llm):
    train = TrainArgs(global_batch_size=1, micro_batch_size=1, max_steps=9, lr_warmup_steps=0)
    metrics = finetune(llm, ANSWER * 3, "full", max_steps=2, train=train, seed=3, epochs=5)
    assert (metrics["steps"], train.max_steps, train.epochs) == (2, 9, None)


def test_weights_keep_their_data_type(checkpoint_dir):
    llm = LLM.load(checkpoint_dir, precision="bf16-true")
    finetune(llm, ANSWER, max_steps=2, epochs=2, global_batch_size=1, lr_warmup_steps=0)
    assert {x.dtype for x in llm.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "prompt"}, "method 'prompt' is not one of full, lora"),
        ({"lora_r": 4, "method": "full"}, "option 'lora_r' is not known to fine-tuning by full"),
        ({"speed": 3}, "option 'speed' is not known"),
        ({"max_step": 3}, "option 'max_step' is not known .*did you mean max_steps"),
        ({"quantize": "int8"}, "option 'quantize' is not known"),  # an LLM is loaded with it
        ({"resume": True}, "give out_dir"),
        ({"logger_name": "paper"}, "logger_name 'paper' is not one of"),
        ({"data": ANSWER[0]}, "data must be a list of samples, the path of a file, or a data module, got {"),
        ({"data": None}, "data must be a list of samples"),
        ({"data": []}, "no samples"),
        ({"data": [{"instruction": "a"}]}, "sample 0 lacks 'output'"),
        ({"lora_r": 0}, "trains nothing"),
        ({"devices": 2, "strategy": "fsdp"}, "leaves the weights divided"),
    ],
)
def test_wrong_arguments_leave_the_llm_as_it_was(arguments, message, llm):
    before = {name: x.clone() for name, x in llm.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        finetune(llm, **({"data": ANSWER} | arguments))
    assert all(torch.equal(x, before[name]) for name, x in llm.state_dict().items())


def test_lightnings_trainer_trains_an_llm(llm, samples, tmp_path):
    import lightning.pytorch as pl

    class Tuning(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.llm, self.losses = llm, []
            self.llm.trainer_setup()

        def training_step(self, batch):
            _, loss = self.llm(batch["input_ids"], target_ids=batch["labels"])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.llm.model.parameters(), lr=0.01)

    data = JSONData(tmp_path, samples)
    data.connect(llm.tokenizer, batch_size=4, max_seq_length=128)
    tuning = Tuning()
    settings = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    pl.Trainer(max_steps=20, **settings).fit(tuning, data)
    assert tuning.losses[-1] < 0.7 * tuning.losses[0]
    assert isinstance(llm.generate("Say one.", max_new_tokens=3), str)


def JSONData(folder, samples):
    (folder / "data.json").write_text(json.dumps(samples))
    return JSON(folder / "data.json", val_split_fraction=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train.min_lr -1", "min_lr must be at least 0, got -1.0"),
        ("--eval.max_iters 0", "eval.max_iters must be at least 1, got 0"),
        ("--eval.evaluate_example -5", "eval.evaluate_example must be at least 0, got -5"),
        ("--data JSON --data.json_path nowhere.json", "nowhere.json"),
        ("--data FLAN --data.subsets none", "none not"),
        ("--data JSON --data.json_path {} --data.val_split_fraction 2", "val_split_fraction"),
        ("--data JSON", "--data JSON needs --data.json_path"),
        ("--data TextFiles", "--data TextFiles needs --data.train_data_path"),
        (
            "--data Jason",
            "--data cannot be 'Jason', it takes one of Alpaca, Alpaca2k, AlpacaGPT4, Deita, FLAN, JSON, LIMA",
        ),
        ("--data litgpt.data.Jason", "cannot be 'litgpt.data.Jason', it takes one of Alpaca"),
        ("--data torch.nn.Linear", "cannot be 'torch.nn.Linear', it takes one of Alpaca"),
        ("--data JSON --data.json_pth {}", "--data JSON has no option --data.json_pth"),
        ("--data.json_path {}", "--data.json_path belongs to a --data that is not given: one of Alpaca"),
        ("--train.max_steps many", "--train.max_steps cannot be 'many', it takes int or null"),
        (
            "--train.keep_inputs moon",
            "--train.keep_inputs cannot be 'moon', it takes 'device' or 'cpu' or 'disk' or int",
        ),
        ("--train.teacher it", "--train.teacher cannot be 'it', it takes 'dense' or null"),
        ("--data Alpaca --data.val_split_fraction much", "--data.val_split_fraction cannot be 'much'"),
    ],
)
def test_what_an_option_or_a_data_module_says_is_the_error(options, message, checkpoint_dir, json_path, capsys):
    assert main(["finetune_lora", str(checkpoint_dir), *options.format(json_path).split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed -1", "--seed must be in 0..4294967295, got -1"),
        ("--num_nodes 0", "--num_nodes must be at least 1, got 0"),
        ("--out_dir {}/out", "is a file, and a folder is needed"),
        ("--precision abc", "precision 'abc' is not one of"),
        ("--kv_cache h2o --cache_length 90000", "--kv_cache: cache_length must be in 1.."),
        ("--kv_cache h2o --kv_cache_args.budget funnel", "--kv_cache: budget must be 'uniform', 'pyramid'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_data_are_read(
    options, message, checkpoint_dir, json_path, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = f"--data JSON --data.json_path {json_path} {options.format(json_path)}"
    assert main(["finetune_lora", str(checkpoint_dir), *arguments.split()]) in (1, 2)
    assert not Path("out").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_pretraining_takes_model_and_tokenizer_by_name(checkpoint_dir, tmp_path, monkeypatch):
    home = tmp_path / "home" / "org"
    home.mkdir(parents=True)
    shutil.copytree(checkpoint_dir, home / "tiny-model")
    monkeypatch.setenv("LITGPT_HOME", str(home.parent))
    (tmp_path / "text.txt").write_text("Some words of a text. " * 40, encoding="utf-8")
    out = tmp_path / "out"
    arguments = f"""pretrain {checkpoint_dir} --initial_checkpoint_dir org/tiny-model --data TextFiles
        --data.train_data_path {tmp_path / "text.txt"} --train.max_steps 1 --train.global_batch_size 1
        --train.micro_batch_size 1 --train.max_seq_length 16 --train.lr_warmup_steps 0 --eval.max_iters 1
        --devices 1 --precision 32-true --logger_name csv --out_dir {out}"""
    assert main(arguments.split()) == 0
    assert (out / "final" / "tokenizer.json").is_file()


def test_pretraining_from_a_checkpoint_has_the_models_own_configuration(checkpoint_dir, tmp_path):
    config = replace(open_checkpoint(checkpoint_dir).config, block_size=16, rope_base=500)
    train = TrainArgs(global_batch_size=2, micro_batch_size=2, max_steps=1, lr_warmup_steps=0, save_interval=None)
    options = {"initial_checkpoint_dir": checkpoint_dir, "train": train, "logger_name": "csv", "devices": 1}
    options |= {"eval": EvalArgs(max_iters=1), "precision": "32-true", "optimizer": {"class_path": "torch.optim.SGD"}}
    pretrain.setup("own", model_config=config, data=Rows(), out_dir=tmp_path / "out", **options)
    trained, before = load_model(tmp_path / "out" / "final"), load_model(checkpoint_dir)
    assert trained.config.rope_base == 500
    after = trained.lm_head.weight
    assert 0 < (after - before.lm_head.weight).abs().max() < 0.1
    config.n_layer = 2
    with pytest.raises(ValueError, match=r"transformer\.h\.2"):
        pretrain.setup("own", model_config=config, data=Rows(), out_dir=tmp_path / "other", **options)
    quantize_checkpoint(checkpoint_dir, tmp_path / "int8", quantize="int8")
    options |= {"initial_checkpoint_dir": tmp_path / "int8"}
    with pytest.raises(ValueError, match="needs plain weights"):
        pretrain.setup(str(checkpoint_dir), data=Rows(), out_dir=tmp_path / "another", **options)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_cache_that_keeps_all_changes_no_training(checkpoint_dir, tmp_path, json_path, method):
    options = {"train": replace(TRAIN, max_steps=2, global_batch_size=2, save_interval=None)}
    options |= {"eval": EvalArgs(max_iters=1, final_validation=False)} | (
        {"lora_dropout": 0.0} if method == "lora" else {}
    )
    plain = run(method, checkpoint_dir, tmp_path / "plain", json_path, **options)
    cached = run(method, checkpoint_dir, tmp_path / "c", json_path, kv_cache="dense", prompt_chunksize=29, **options)
    options |= {"cache_length": 24, "prompt_chunksize": 16}
    evicting = run(method, checkpoint_dir, tmp_path / "e", json_path, kv_cache="lastrec", **options)
    for name, weight in plain.items():
        torch.testing.assert_close(cached[name], weight, rtol=1e-3, atol=1e-5)
    assert any((evicting[name] - weight).abs().max() > 1e-4 for name, weight in plain.items())


@pytest.mark.parametrize("form", ["text", "value"])
def test_what_is_trained_through_a_cache_is_served_with_it(form, checkpoint_dir, tmp_path, json_path, capsys):
    spec = CacheSpec("lastrec", cache_length=8, n_sink=2)
    text = {"kv_cache": "lastrec", "cache_length": 8, "kv_cache_args": {"n_sink": 2}}
    run("lora", checkpoint_dir, tmp_path, json_path, **(text if form == "text" else {"kv_cache": spec}))
    final = tmp_path / "final"
    values = yaml.safe_load((final / "hyperparameters.yaml").read_text())
    assert {name: values[name] for name in text} == text
    assert LLM.load(final).session().kv_caches[0].policy == spec.make_policy(8)
    assert LLM.load(final).session(kv_cache="dense").kv_caches == []
    capsys.readouterr()
    assert main(["generate", str(final), "--prompt", "Hello", "--max_new_tokens", "3"]) == 0
    assert "Using the key-value cache that the model was trained with: lastrec of 8 tokens" in capsys.readouterr().err
    arguments = ["generate_lora", "--lora_path", str(final), "--prompt", "Hello", "--max_new_tokens", "3"]
    assert main(arguments) == 0
    assert "trained with: lastrec" in capsys.readouterr().err
    assert main(["generate", str(final), "--kv_cache", "dense", "--prompt", "Hello", "--max_new_tokens", "3"]) == 0
    assert "trained with" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kv_cache kvzip-int8", "--kv_cache: kvzip cannot be trained through: it reads a text a second time"),
        ("--kv_cache h2o --cache_length 0", "--kv_cache: cache_length must be at least 1, got 0"),
        (
            "--kv_cache h2o --cache_length 8 --kv_cache_args.tail 8",
            "--kv_cache: tail must be in 1..7 with cache_length=8",
        ),
        ("--kv_cache ./mine.py:Mine", "'./mine.py' is not the name of a module"),
        ("--kv_cache h2o --train.teacher dense --devices 2 --strategy fsdp", "fsdp divides among devices"),
        ("--kv_cache h2o --train.keep_inputs 2 --devices 2 --strategy fsdp", "device, cpu or disk"),
    ],
)
def test_a_cache_that_cannot_be_trained_through_is_refused_before_work(tmp_path, capsys, options, message):
    arguments = ["finetune_lora", "no_such_checkpoint", "--out_dir", str(tmp_path / "out"), *options.split()]
    assert main(arguments) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
