"""Quantised weights on disk, and on their way from disk into memory."""

import json
import subprocess
import sys

import pytest
import test_gguf
import torch
from gguf import GGMLQuantizationType
from tiny import LLAMA, VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.checkpoint.base import QUANTIZED_NAME
from litgpt.checkpoint.export import save_huggingface
from litgpt.checkpoint.load import load_model, save_litgpt, save_quantized
from litgpt.checkpoint.open import open_checkpoint
from litgpt.checkpoint.quantized_folder import QuantizedCheckpoint
from litgpt.engine.loading import make_ready
from litgpt.runners.quantized_weights import Int4Linear, Int8Linear, Scheme, TiedHead, quantize_model

MODES = pytest.mark.parametrize("mode", ["int8", "int4"])
MOE = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "intermediate_size": 32}


@pytest.fixture
def folder(tmp_path):
    """A LitGPT folder of a tiny model with a tokenizer."""
    return litgpt_folder(tmp_path / "plain")


def litgpt_folder(path, tied=False, dtype=torch.bfloat16, **flags):
    model = tiny_gpt(**VOCABULARY, **flags).to(dtype)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    path.mkdir()
    tiny_tokenizer().save(path)
    save_litgpt(model, path)
    return path


def same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name
    assert model.quantization == other.quantization


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flags", [{}, {"bias": True}, {"intermediate_size": 80}, MOE])
@MODES
def test_quantised_as_it_is_read_is_quantised_afterwards(mode, flags, tied, dtype, tmp_path):
    path = litgpt_folder(tmp_path / "plain", tied, dtype, **flags)
    expected = load_model(path)
    quantize_model(expected, mode)
    same_state(load_model(path, quantize=mode), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flags", [{}, {"bias": True, "lm_head_bias": True}, {"intermediate_size": 80}, MOE])
@MODES
def test_what_was_saved_is_what_is_loaded(mode, flags, tied, tmp_path):
    path = litgpt_folder(tmp_path / "plain", tied, **flags)
    expected = load_model(path, quantize=mode)
    save_quantized(open_checkpoint(path), tmp_path / "by piece", Scheme(mode))
    save_quantized(expected, tmp_path / "model")
    for out in ("by piece", "model"):
        checkpoint = open_checkpoint(tmp_path / out)
        assert isinstance(checkpoint, QuantizedCheckpoint)
        assert (checkpoint.tied, checkpoint.dtype, checkpoint.quantization) == (tied, torch.bfloat16, Scheme(mode))
        model = load_model(checkpoint)
        same_state(model, expected)
        assert isinstance(model.lm_head, TiedHead if tied else Int8Linear)
        assert load_model(checkpoint, torch.float32).dtype == torch.float32


def test_group_sizes_are_remembered(folder, tmp_path):
    save_quantized(open_checkpoint(folder), tmp_path / "out", Scheme("int4", 64))
    qkv = load_model(tmp_path / "out").transformer.h[0].attn.qkv
    assert isinstance(qkv, Int4Linear)
    assert qkv.scale.shape == (128, 1)


@pytest.mark.parametrize("tied", [False, True])
@MODES
def test_other_readers_get_what_the_integers_stand_for(mode, tied, tmp_path):
    save_quantized(open_checkpoint(litgpt_folder(tmp_path / "plain", tied)), tmp_path / "out", Scheme(mode))
    checkpoint = open_checkpoint(tmp_path / "out")
    quantised = load_model(checkpoint, torch.float32)
    plain = load_model(litgpt_copy(checkpoint, tmp_path / "copy"), torch.float32)
    idx = torch.randint(0, 261, (1, 30))
    torch.testing.assert_close(quantised(idx), plain(idx), atol=1e-4, rtol=1e-4)
    assert {name for name, _ in checkpoint.tensors()} == set(plain.state_dict())
    save_huggingface(checkpoint, tmp_path / "hf")
    torch.testing.assert_close(load_model(tmp_path / "hf", torch.float32)(idx), plain(idx))


def litgpt_copy(checkpoint, path):
    save_litgpt(checkpoint, path)
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_gguf_files_own_integers_are_kept(tmp_path, monkeypatch, kind):
    for module in (test_gguf, test_gguf.tiny_models):
        monkeypatch.setattr(module, "CASES", {**module.CASES})
    model_type, values = test_gguf.tiny_models.CASES["llama"]
    test_gguf.tiny_models.CASES["llama"] = (model_type, values | {"intermediate_size": 64, "vocab_size": 96})
    model = test_gguf.random_model("llama")
    file = test_gguf.write_gguf(tmp_path / "tiny.gguf", "llama", model, GGMLQuantizationType[kind])
    exact = load_model(open_checkpoint(file), torch.float32)
    quantised = load_model(open_checkpoint(file), torch.float32, quantize="int4")
    for name, layer in quantised.named_modules():
        if isinstance(layer, Int4Linear):
            assert torch.equal(layer.dequantized(torch.float32), exact.get_submodule(name).weight), name


@pytest.mark.real_model
def test_the_default_models_own_integers_are_kept(default_gguf):
    checkpoint = open_checkpoint(default_gguf)
    layers = dict(load_model(checkpoint, torch.bfloat16, quantize="int4").named_modules())
    kept = 0
    for name, tensor in checkpoint.tensors():
        layer = layers[name.rpartition(".")[0]]
        if isinstance(layer, Int4Linear):
            assert torch.equal(layer.dequantized(torch.float32), tensor), name
            kept += tensor.numel()
    assert kept == 106_168_320


# --- memory


SCRIPT = """
import json, sys
def memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
from litgpt.checkpoint.load import load_model, save_quantized
from litgpt.checkpoint.open import open_checkpoint
from litgpt.runners.quantized_weights import QuantizedLinear, Scheme
path, out, mode = sys.argv[1:]
samples = []
quantized_parts = QuantizedLinear.quantized_parts
def sampled(layer, values):
    for part in quantized_parts(layer, values):
        yield part
        samples.append(memory())
QuantizedLinear.quantized_parts = sampled
checkpoint = open_checkpoint(path)
checkpoint.config, checkpoint.tied
before, held = memory(), 0
if out == "-":
    model = load_model(checkpoint, quantize=mode if mode != "stored" else None)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
else:
    save_quantized(checkpoint, out, Scheme(mode))
samples.append(memory())
print(json.dumps({"peak": max(samples) - before, "held": held, "samples": len(samples)}))
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """Of 140 million parameters in bfloat16, 280 MB."""
    path = tmp_path_factory.mktemp("large") / "plain"
    config = {**LLAMA, "n_embd": 1024, "n_head": 8, "n_layer": 8, "intermediate_size": 4096, "padded_vocab_size": 8192}
    from litgpt.checkpoint.meta_model import meta_model
    from litgpt.config import Config

    model = meta_model(Config(**config)).to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(0.25)
    save_litgpt(model, path)
    return path


def measured(path, out, mode):
    command = [sys.executable, "-c", SCRIPT, str(path), str(out), mode]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@MODES
def test_memory_stays_near_the_quantised_size(mode, large_folder, tmp_path):
    """While quantising as weights are read, while writing, and while reading what was written: never the whole model."""
    plain = (large_folder / "lit_model.pth").stat().st_size
    loaded = measured(large_folder, "-", mode)
    assert loaded["held"] < plain * (0.52 if mode == "int8" else 0.37)  # the two tables have 8 bits in any case
    assert loaded["samples"] > 30
    # not much less: a system short of memory takes idle pages away
    assert 0.5 * loaded["held"] < loaded["peak"] < loaded["held"] + plain / 3
    assert measured(large_folder, tmp_path / "out", mode)["peak"] < plain / 3
    again = measured(tmp_path / "out", "-", "stored")
    assert again["held"] == loaded["held"]
    assert again["peak"] < again["held"] + plain / 5


# --- front ends


def test_the_command_writes_a_folder_that_others_open(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(folder), str(out), "--quantize", "int4", "--group_size", "64"]) == 0
    assert capsys.readouterr().out == f"{out / QUANTIZED_NAME}\n"
    weights = [file.name for file in out.iterdir() if file.suffix in (".pth", ".safetensors")]
    assert weights == [QUANTIZED_NAME]
    assert main(["generate", str(folder), "--quantize", "int4", "--max_new_tokens", "3", "--temperature", "0"]) == 0
    assert main(["validate", str(out)]) == 0
    report = capsys.readouterr().out
    assert "names and shapes fit the config, stored as int4" in report
    assert " kB in int4" in report
    assert main(["generate", str(out), "--max_new_tokens", "3", "--temperature", "0"]) == 0
    assert QuantizedCheckpoint(out).quantization == Scheme("int4", 64)


@MODES
def test_answers_do_not_depend_on_when_weights_were_quantised(mode, folder, tmp_path, capsys):
    save_quantized(open_checkpoint(folder), tmp_path / "out", Scheme(mode))
    answers = []
    for args in ([str(folder), "--quantize", mode], [str(tmp_path / "out")]):
        assert main(["generate", *args, "--max_new_tokens", "20", "--temperature", "0"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


@MODES
def test_llm_quantises_at_load_or_later_and_saves_what_it_has(mode, folder, tmp_path):
    given = {"max_new_tokens": 20, "temperature": 0, "return_as_token_ids": True}
    llm = LLM.load(folder, quantize=mode)
    expected = llm.generate("Hello!", **given)
    llm.save(tmp_path / "saved")
    assert torch.equal(llm.generate("Hello!", **given), expected)
    assert torch.equal(LLM.load(tmp_path / "saved").generate("Hello!", **given), expected)
    later = LLM.load(folder, distribute=None)
    later.distribute(quantize=mode)
    assert torch.equal(later.generate("Hello!", **given), expected)
    assert not any(parameter.requires_grad for parameter in later.parameters())


def test_readiness_takes_the_modes_that_there_are(folder):
    from typing import get_args

    from litgpt.engine.loading import Quantization
    from litgpt.runners import quantized_weights as quantize

    of_training = {"bnb.int8-training"}
    assert {*get_args(Quantization), *of_training} == {*quantize.MODES, *quantize.BNB_MODES}


# --- errors


@MODES
def test_quantised_folders_are_not_quantised_again(mode, folder, tmp_path, capsys):
    out = tmp_path / "out"
    save_quantized(open_checkpoint(folder), out, Scheme(mode))
    for args in (["generate", str(out)], ["quantize", str(out), str(tmp_path / "twice")]):
        assert main([*args, "--quantize", "int8"]) == 1
        assert f"{out} is quantised already ({mode})" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
    with pytest.raises(ValueError, match="is quantised already"):
        make_ready(out, quantize="int4")


def test_weights_of_another_kind_are_not_joined_by_quantised_ones(folder, capsys):
    assert main(["quantize", str(folder), str(folder)]) == 1
    assert f"{folder} holds weights already (lit_model.pth): give another folder" in capsys.readouterr().err


def test_quantised_weights_are_not_trained(folder):
    with pytest.raises(ValueError, match="^quantised weights cannot be trained: load the model without quantize$"):
        LLM.load(folder, quantize="int8").trainer_setup()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bitsandbytes_is_refused_before_anything_is_fetched(capsys):
    assert main(["generate", "org/nowhere", "--quantize", "bnb.nf4"]) == 1
    assert capsys.readouterr().err.startswith("litgpt: error: quantize='bnb.nf4' needs a GPU")


def test_damaged_and_foreign_files_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    save_quantized(open_checkpoint(folder), out, Scheme("int4"))
    file = out / QUANTIZED_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_model(out)
    file.write_bytes(whole.replace(b'"quantization":"int4"', b'"quantizatiom":"int4"'))
    with pytest.raises(ValueError, match="does not say how it is quantised"):
        load_model(out)
    file.write_bytes(whole.replace(b"h.0.attn.qkv.scale", b"h.0.attn.qkv.skale"))
    with pytest.raises(ValueError, match=r"missing: transformer\.h\.0\.attn\.qkv\.scale; not expected: "):
        load_model(out)


def test_nothing_is_left_of_a_file_that_could_not_be_written(folder, tmp_path, monkeypatch):
    def fail(self, values):
        raise RuntimeError("stop")

    monkeypatch.setattr(Int4Linear, "quantized", fail)
    with pytest.raises(RuntimeError, match="stop"):
        save_quantized(open_checkpoint(folder), tmp_path / "out", Scheme("int4"))
    left = {file.name for file in (tmp_path / "out").iterdir()}  # side files come first, weights last
    assert not any("safetensors" in name or name.endswith(".tmp") for name in left)
