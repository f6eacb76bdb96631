"""The functions that scripts written for LitGPT import, called as such scripts call them."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning import Fabric
from lightning.fabric.strategies import FSDPStrategy, SingleDeviceStrategy
from tiny import tiny_gpt

from litgpt import adapter, lora, pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.finetuned import Finetuned
from litgpt.checkpoint.load import load_finetuned, load_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.data import JSON
from litgpt.finetune import adapter as finetune_adapter
from litgpt.finetune import adapter_v2 as finetune_adapter_v2
from litgpt.finetune import full as finetune_full
from litgpt.finetune import lora as finetune_lora
from litgpt.utils import estimate_flops, load_checkpoint

TRAIN = TrainArgs(save_interval=2, global_batch_size=4, micro_batch_size=2, lr_warmup_steps=1, max_steps=4, epochs=5)
EVAL = EvalArgs(interval=2, max_iters=2, max_new_tokens=3)


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def data(json_path):
    return JSON(json_path, val_split_fraction=0.2)


def test_a_script_that_calls_the_parts_of_lora(fabric, data, checkpoint_dir, tmp_path, capsys):
    finetune_lora.validate_args(TRAIN, EVAL)
    tokenizer = open_checkpoint(checkpoint_dir).tokenizer()
    train_loader, val_loader = finetune_lora.get_dataloaders(fabric, data, tokenizer, TRAIN)
    longest, index = finetune_lora.get_longest_seq_length(train_loader.dataset)
    assert longest == len(train_loader.dataset[index]["input_ids"]) == max(train_loader.dataset.lengths)
    config = lora.Config.extending(open_checkpoint(checkpoint_dir).config, lora_r=4, lora_query=True)
    model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    load_checkpoint(fabric, model, checkpoint_dir / "lit_model.pth", strict=False)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
    scheduler = finetune_lora.get_lr_scheduler(optimizer, 1, 4)
    before = finetune_lora.validate(fabric, model, val_loader, EVAL)
    parts = (model, optimizer, scheduler, train_loader, val_loader, 1, checkpoint_dir, tmp_path, TRAIN, EVAL, data)
    counts = finetune_lora.fit(fabric, *parts)
    assert counts["raw_tokens_plus_prompt_template_and_padding"] > counts["raw_tokens"] > 0
    assert finetune_lora.validate(fabric, model, val_loader, EVAL) < before
    file = tmp_path / "final" / "lit_model.pth.lora"
    finetune_lora.save_lora_checkpoint(fabric, model, file)
    assert set(torch.load(file)["model"]) == set(torch.load(tmp_path / "step-000004" / file.name)["model"])
    finetune_lora.generate_example(fabric, model, tokenizer, EVAL, data)
    assert "\nSay " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "suffix", "config"),
    [
        (finetune_lora, ".lora", {"lora_r": 2, "lora_mlp": True}),
        (finetune_adapter, ".adapter", {}),
        (finetune_full, "", {}),
    ],
)
def test_main_of_a_method(module, suffix, config, fabric, data, checkpoint_dir, tmp_path):
    kind = {".lora": lora.Config, ".adapter": adapter.Config}.get(suffix)
    base = open_checkpoint(checkpoint_dir).config
    devices_and_seed = (1, False, 1) if module is finetune_full else (1, 1)  # in LitGPT's order
    rest = {"out_dir": tmp_path, "train": TRAIN, "eval": EVAL, "optimizer": "AdamW"}
    config = kind.extending(base, **config) if kind else base
    module.main(fabric, *devices_and_seed, config, data, checkpoint_dir, **rest)
    assert (tmp_path / "final" / f"lit_model.pth{suffix}").is_file()
    if suffix == ".lora":
        load_finetuned(
            Finetuned(tmp_path / "final", "lora"), open_checkpoint(checkpoint_dir), torch.float32, torch.device("cpu")
        )


_PARTS = "model optimizer scheduler train_dataloader val_dataloader devices"
_FOLDERS = "checkpoint_dir out_dir train eval data num_nodes"
FITS = {  # the parameters of LitGPT 0.5.13
    finetune_lora: f"fabric {_PARTS} {_FOLDERS}",
    finetune_adapter: f"fabric {_PARTS} {_FOLDERS}",
    finetune_adapter_v2: f"fabric {_PARTS} resume {_FOLDERS}",
    finetune_full: f"fabric state train_dataloader val_dataloader devices resume {_FOLDERS}",
    pretrain: "fabric devices state train_dataloader val_dataloader out_dir tokenizer_dir train eval num_nodes",
}


@pytest.mark.parametrize("module", FITS)
def test_fit_has_litgpts_parameters(module):
    assert " ".join(inspect.signature(module.fit).parameters) == FITS[module]


def test_a_script_that_calls_fit_of_the_whole_model(fabric, data, checkpoint_dir, tmp_path):
    tokenizer = open_checkpoint(checkpoint_dir).tokenizer()
    both = finetune_full.get_dataloaders(fabric, data, tokenizer, TRAIN)
    loaders = {"train_dataloader": both[0], "val_dataloader": both[1]}
    model = fabric.setup_module(load_model(checkpoint_dir).requires_grad_(True))
    state = {"model": model, "optimizer": fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))}
    state["scheduler"] = finetune_full.get_lr_scheduler(state["optimizer"], 1, 4)
    before = finetune_full.validate(fabric, model, loaders["val_dataloader"], EVAL)
    rest = {"checkpoint_dir": checkpoint_dir, "out_dir": tmp_path, "train": TRAIN, "eval": EVAL, "data": data}
    finetune_full.fit(fabric=fabric, state=state, **loaders, devices=1, resume=False, **rest)
    assert finetune_full.validate(fabric, model, loaders["val_dataloader"], EVAL) < before


def test_a_script_that_calls_the_parts_of_pretraining(fabric, tmp_path):
    torch.manual_seed(0)
    gpt = tiny_gpt().requires_grad_(True)
    pretrain.initialize_weights(fabric, gpt, 2, 64)
    rows = torch.arange(33).repeat(8, 1) + torch.arange(8)[:, None]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    model = fabric.setup_module(gpt)
    state = {"model": model, "optimizer": fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))}
    before = pretrain.validate(fabric, model, loader, 4)
    pretrain.fit(fabric, 1, state, loader, loader, tmp_path, None, TRAIN, EvalArgs(interval=2))
    assert pretrain.validate(fabric, model, loader, 4) < before
    saved = load_model(Path(tmp_path) / "step-00000004")
    assert torch.equal(saved.lm_head.weight, gpt.lm_head.weight)


@pytest.mark.parametrize(("strategy", "resets"), [(SingleDeviceStrategy, 1), (FSDPStrategy, 0)])
def test_new_weights_reset_what_has_no_weights_of_its_own(strategy, resets):
    class Part(torch.nn.Module):
        calls = 0

        def reset_parameters(self):
            self.calls += 1

    whole = Part()
    whole.part = Part()
    whole.linear = torch.nn.Linear(64, 64)
    pretrain.initialize_weights(SimpleNamespace(strategy=mock.Mock(spec=strategy)), whole, 2, 64)
    assert (whole.calls, whole.part.calls) == (resets, resets)
    assert 0.06 < whole.linear.weight.std() < 0.1


def test_flops_are_two_a_parameter_and_token_and_three_times_that_in_training():
    gpt = tiny_gpt().requires_grad_(True)
    once = estimate_flops(gpt, training=False)
    assert 2 * 128 * sum(p.numel() for p in gpt.parameters()) < once < estimate_flops(gpt, training=True) == 3 * once


SHARED = "optimizer logger_name seed access_token"
LORA = "lora_r lora_alpha lora_dropout lora_query lora_key lora_value lora_projection lora_mlp lora_head"
PARAMETERS = {  # of LitGPT 0.5.13, in its order
    finetune_full: f"checkpoint_dir out_dir precision devices num_nodes resume data train eval log {SHARED}",
    finetune_lora: f"checkpoint_dir out_dir precision quantize devices num_nodes {LORA} data train log eval {SHARED}",
    finetune_adapter: f"checkpoint_dir out_dir precision quantize devices num_nodes data train eval log {SHARED}",
    pretrain: "model_name model_config out_dir precision initial_checkpoint_dir resume data train eval log optimizer "
    "devices num_nodes tokenizer_dir logger_name seed",
}


@pytest.mark.parametrize("module", PARAMETERS, ids=lambda module: module.__name__)
def test_parameters_of_setup_are_litgpts_in_its_order(module):
    parameters = inspect.signature(module.setup).parameters
    expected = PARAMETERS[module].split()
    assert [name for name in parameters if name in expected] == expected
    required = [name for name, p in parameters.items() if p.default is p.empty]
    assert required == expected[:1]
    assert parameters["out_dir"].annotation is Path
