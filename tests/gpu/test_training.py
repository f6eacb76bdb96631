"""Training on the device: the losses, gradients and checkpoints of the CPU."""

import copy
from functools import partial

import pytest
import torch
from lightning import Fabric
from tiny import CHAT_TEMPLATE, VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.testing import KV_CACHE_NAMES
from litgpt.lora import Config, add_lora
from litgpt.prompts import ChatTemplate
from litgpt.train import finetune, setting
from litgpt.train.cached_layers import CachedLayers

pytestmark = pytest.mark.gpu

SAMPLES = [
    {"instruction": f"Say {word} {i} times.", "output": " ".join([word] * i)}
    for i in range(1, 4)
    for word in ("one", "two", "red")
]
OPTIONS = {
    "max_steps": 20,
    "epochs": 99,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "lr_warmup_steps": 2,
    "precision": "32-true",
    # Adam's own eps magnifies rounding
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "eps": 1e-3}},
}
TRAINABLE = [name for name in KV_CACHE_NAMES if "kvzip" not in name and "kivi" not in name]
FEWER = [name for name in TRAINABLE if name.split("-")[0] in ("dense", "lastrec", "h2o") or name.endswith("-default")]


@pytest.fixture
def llm():
    model = tiny_gpt(**VOCABULARY, block_size=128, n_layer=3)
    for parameter in model.parameters():
        parameter.mul_(0.3)
    return LLM(model.requires_grad_(True), Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE))


def on(accelerator, llm, monkeypatch, quantize=None, method="lora", **options):
    """Losses of a run on a kind of device, and the LLM after it."""
    monkeypatch.setattr(setting, "Fabric", partial(Fabric, accelerator=accelerator))
    llm = copy.deepcopy(llm)
    llm.distribute(
        accelerator="cpu", precision="32-true", quantize=quantize
    )  # so that LoRA's first numbers are the same
    if method == "lora":
        options = {"lora_dropout": 0.0, **options}
    torch.manual_seed(0)
    metrics = finetune(llm, SAMPLES, method, **{**OPTIONS, "val_split_fraction": 0.25, **options})
    return metrics["train_loss"], metrics["val_loss"], llm


def both(llm, device, monkeypatch, **options):
    *expected, _ = on("cpu", llm, monkeypatch, **options)
    *found, tuned = on(device.type, llm, monkeypatch, **options)
    assert tuned.model.device.type == device.type
    assert isinstance(tuned.generate("Say one", max_new_tokens=4, temperature=0.0), str)
    return found, expected


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "adapter_v2"])
def test_twenty_steps_of_every_method(method, llm, device, monkeypatch):
    found, expected = both(llm, device, monkeypatch, method=method)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_lora_beside_weights_in_fewer_bits(quantize, llm, device, monkeypatch):
    found, expected = both(llm, device, monkeypatch, quantize=quantize)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("options", [{"lora_dora": True}, {"lora_all": True, "activation_checkpointing": True}])
def test_other_options_of_lora(options, llm, device, monkeypatch):
    found, expected = both(llm, device, monkeypatch, **options)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache": "h2o"},
        {"kv_cache": "lastrec", "keep_inputs": "cpu"},
        {"kv_cache": "lastrec-int8", "keep_inputs": 2},
        {"kv_cache": "snapkv", "method": "full", "keep_inputs": "disk"},
        {"kv_cache": "lastrec", "teacher": "dense"},
    ],
    ids=str,
)
def test_steps_through_caches(options, llm, device, monkeypatch):
    through = {"cache_length": 24, "prompt_chunksize": 16, "max_steps": 6, **options}
    found, expected = both(llm, device, monkeypatch, **through)
    assert found == pytest.approx(expected, abs=1e-3 if "int8" in options["kv_cache"] else 1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("kv_cache", [None, "lastrec"])
def test_other_precisions_learn(precision, kv_cache, llm, on_gpu, monkeypatch):
    through = {} if kv_cache is None else {"kv_cache": kv_cache, "cache_length": 24, "prompt_chunksize": 16}
    first, _, _ = on("cuda", llm, monkeypatch, max_steps=1, precision=precision, **through)
    last, _, _ = on("cuda", llm, monkeypatch, max_steps=20, precision=precision, **through)
    assert last < first


def test_a_run_that_is_resumed_ends_as_one_that_is_not(llm, device, monkeypatch, tmp_path):
    losses = []
    for name, parts in (("whole", [6]), ("parts", [4, 6])):
        for end in parts:
            options = {"max_steps": end, "save_interval": 2, "lora_dropout": 0.1, "out_dir": tmp_path / name}
            # the schedule is that of a run of six steps
            options |= {"resume": "auto" if end != parts[0] else False, "lr_warmup_steps": 0}
            loss, _, tuned = on(device.type, llm, monkeypatch, **options)
        losses.append(loss)
        if name == "whole":
            expected = {key: x.cpu() for key, x in tuned.model.state_dict().items()}
    assert losses[0] == pytest.approx(losses[1], abs=5e-2)
    assert expected.keys() == tuned.model.state_dict().keys()


def gradients(model, spec, idx, weight, **options):
    outputs = CachedLayers(model, spec, 4, **options)(idx)
    params = [p for name, p in model.named_parameters() if "lm_head" not in name]
    found = torch.autograd.grad((outputs * weight).sum(), params, allow_unused=True)
    return [outputs, *(x for x in found if x is not None)]


@pytest.mark.parametrize("name", FEWER)
def test_gradients_through_every_cache(name, device):
    model = tiny_gpt(block_size=64, **VOCABULARY).double().requires_grad_(True)
    spec = CacheSpec.parse(name)
    spec = CacheSpec.parse(spec, cache_length=9 if spec.evicts else 20)
    idx, weight = torch.randint(0, 100, (1, 17)), torch.randn(1, 17, 64, dtype=torch.float64)
    expected = gradients(model, spec, idx, weight)
    keep = {} if spec.storage == "offload" else {"keep_inputs": "cpu"}
    model.to(device)
    table = model.rope_table  # in float32, whose last bits differ between devices
    table.cos, table.sin = table.cos.to(device), table.sin.to(device)
    for options in ({}, keep, {"keep_inputs": 2}):
        found = gradients(model, spec, idx.to(device), weight.to(device), **options)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, atol=1e-8, rtol=1e-8)


def test_dropout_is_the_same_in_both_passes(device):
    """The gradients are those of the outputs: a step against them lowers the loss by what they say."""
    torch.manual_seed(0)
    model = tiny_gpt(block_size=64, **VOCABULARY).double()
    config = Config.extending(model.config, lora_r=2, lora_alpha=4, lora_dropout=0.3, lora_all=True)
    add_lora(model, config)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model.double().to(device).train()
    params = [p for p in model.parameters() if p.requires_grad]
    idx, spec = torch.randint(0, 100, (1, 17), device=device), CacheSpec("h2o", cache_length=9)

    def loss():
        torch.manual_seed(5)
        return CachedLayers(model, spec, 4)(idx).square().sum()

    before = loss()
    found = torch.autograd.grad(before, params)
    step = 1e-6 / sum(x.square().sum() for x in found).sqrt()
    with torch.no_grad():
        for parameter, x in zip(params, found, strict=True):
            parameter -= step * x
    change = (before - loss()) / (step * sum(x.square().sum() for x in found))
    assert change.item() == pytest.approx(1, abs=1e-2)
