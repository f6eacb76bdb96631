"""The memory of a training step through caches, as it is foreseen and as tensors then take it."""

import weakref

import pytest
import torch
from tiny import tiny_gpt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt.__main__ import main
from litgpt.checkpoint.load import save_litgpt
from litgpt.kvcache import CacheSpec
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import add_lora, mark_only_lora_as_trainable
from litgpt.train import loss, run, step_memory
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.model import TrainingModel
from litgpt.train.step_memory import StepMemory, trained_numbers


class Peak(TorchDispatchMode):
    """The most bytes that tensors which came into being inside of it take at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        own = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.seen | own:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return found

    def _gone(self, place, size):
        self.seen.discard(place)
        self.now -= size


def measured(spec, length, keep_inputs):
    torch.manual_seed(0)
    model = tiny_gpt(n_layer=6, block_size=2048, n_embd=128, intermediate_size=128)
    add_lora(model, LoRAConfig.extending(model.config, lora_r=2, lora_query=True, lora_value=True))
    mark_only_lora_as_trainable(model)
    training = TrainingModel(model.train(), cached_layers=CachedLayers(model, spec, 32, keep_inputs))
    ids = torch.randint(0, 100, (1, length + 1))
    model.rope_rows(0, length, False)  # stays in memory for good
    with Peak() as peak:
        training(ids[:, :-1], ids[:, 1:]).backward()
    return peak.most, StepMemory(model.config, spec, 1, length, 32).total(keep_inputs)


@pytest.mark.parametrize(("keep_inputs", "length"), [("device", 512), ("device", 128), (3, 512), ("disk", 512)])
def test_a_step_takes_about_what_is_foreseen(keep_inputs, length, monkeypatch):
    for module in (loss, step_memory):
        monkeypatch.setattr(module, "LEAN_LOGITS_BYTES", 1 << 12)
    spec = CacheSpec("lastrec", cache_length=64)
    found, foreseen = measured(spec, length, keep_inputs)
    assert 0.75 * foreseen < found < 1.3 * foreseen


@pytest.mark.parametrize("every", ["device", 3])
def test_the_positions_kept_are_those_of_every_layers_own_slots(every):
    spec, config = (
        CacheSpec("h2o", cache_length=64, budget=[1, 1, 1, 1, 1, 7]),
        tiny_gpt(n_layer=6, block_size=1024).config,
    )
    step = StepMemory(config, spec, 1, 512, 32)
    slots, kept = spec.layer_lengths(config, 64), [0, 1, 2, 3, 4, 5] if every == "device" else [2, 5, 3, 4]
    calls = [512 // min(32, spec.make_policy(own).tail) - 1 for own in slots]
    positions = sum(4 * config.n_query_groups * slots[i] * calls[i] for i in kept)
    assert step.kept(every) == positions + len(kept) * step.inputs


def test_with_inputs_on_the_disk_a_text_twice_as_long_takes_little_more(monkeypatch):
    monkeypatch.setattr(loss, "LEAN_LOGITS_BYTES", 1 << 12)
    spec = CacheSpec("lastrec", cache_length=64)
    shorter, longer = (measured(spec, length, "disk")[0] for length in (256, 512))
    one_layer = StepMemory(tiny_gpt(n_embd=128).config, spec, 1, 256, 32).one_layer
    assert longer - shorter < 1.5 * one_layer


def test_the_command_plans_a_step_and_says_what_fits(tmp_path, capsys):
    save_litgpt(tiny_gpt(name="tiny", block_size=2048, n_layer=8), tmp_path)
    arguments = ["plan_cache", str(tmp_path), "--train", "lora", "--kv_cache", "h2o", "--cache_length", "64"]
    arguments += ["--context", "1024", "--prompt_chunksize", "32", "--precision", "32-true"]
    assert main([*arguments, "--memory", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "keep_inputs device:" in said
    assert "keep_inputs 2:" in said
    assert said.splitlines()[-1].endswith(
        "--train.max_seq_length 1024 --train.micro_batch_size 1 --train.keep_inputs device"
    )
    assert main([*arguments, "--memory", "4MB"]) == 0
    assert "--train.keep_inputs disk" in capsys.readouterr().out.splitlines()[-1]
    assert main([*arguments, "--memory", "1MB"]) == 0
    assert "Nothing fits: try a shorter --train.max_seq_length" in capsys.readouterr().out
    assert main(["plan_cache", str(tmp_path), "--train", "lora", "--kv_cache", "kvzip"]) == 1
    assert "kvzip cannot be trained through" in capsys.readouterr().err


def test_trained_numbers_are_those_of_the_method():
    model = tiny_gpt(n_layer=3)
    config = model.config
    assert trained_numbers(config, "full") == sum(p.numel() for p in model.parameters())
    assert trained_numbers(config, "lora") == 3 * 8 * (64 + 64 + 64 + 32)
    assert 0 < trained_numbers(config, "adapter") < trained_numbers(config, "adapter_v2")


def test_a_batch_that_does_not_fit_is_refused_with_the_options_that_help(
    checkpoint_dir, json_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "available_bytes", lambda device: 400_000)
    arguments = f"""finetune_lora {checkpoint_dir} --data JSON --data.json_path {json_path} --data.val_split_fraction 0
        --kv_cache lastrec --cache_length 8 --prompt_chunksize 4 --train.max_steps 1 --out_dir {tmp_path / "out"}"""
    assert main(arguments.split()) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "tokens does not fit: it needs about" in error
    assert "and 400 kB are left; what helps is" in error
