import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from litgpt.__main__ import main
from litgpt.checkpoint import load_model, save_litgpt
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_pretrained_checkpoint import convert_pretrained_checkpoint

PYTHIA = {"n_layer": 2, "n_embd": 16, "vocab_size": 20, "block_size": 8, "padding_multiple": 4}


@pytest.fixture
def hf_model(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    return model


@torch.inference_mode()
def test_there_and_back_through_the_command_line(hf_model, tmp_path, capsys):
    assert main(["convert_to_litgpt", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "hf" / "lit_model.pth")
    assert main(["convert_from_litgpt", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "back")
    for start in ("vllm serve", "python -m sglang.launch_server --model-path"):
        assert f"{start} {tmp_path / 'back'} --served-model-name hf --port 8000\n" in said.err
    assert "llama-server -m hf-converted.gguf --alias hf --port 8000\n" in said.err
    tokens = torch.randint(30, (1, 9))
    expected = hf_model(tokens).logits
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back(tokens).logits, expected, atol=0, rtol=0)
    torch.testing.assert_close(load_model(tmp_path / "hf")(tokens), expected, atol=1e-4, rtol=1e-4)


def test_dtype_is_what_is_written(hf_model, tmp_path):
    convert_hf_checkpoint(tmp_path / "hf", dtype="bfloat16")
    weights = torch.load(tmp_path / "hf" / "lit_model.pth", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    for wrong in ("int8", "nonsense", "nn"):
        with pytest.raises(ValueError, match=f"dtype '{wrong}' is no floating-point type"):
            convert_hf_checkpoint(tmp_path / "hf", dtype=wrong)


def test_debug_mode_names_every_weight(hf_model, tmp_path, capsys):
    convert_hf_checkpoint(tmp_path / "hf", debug_mode=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("transformer.h.1.mlp.proj.weight (1,536 bytes)") for line in lines)


def test_a_folder_without_config_needs_a_name(tmp_path):
    config = Config.from_name("pythia-14m")
    hf = transformers.GPTNeoXConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=50304
    )
    for name in ("pythia-14m", "unknown"):
        transformers.GPTNeoXForCausalLM(hf).save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").unlink()
    convert_hf_checkpoint(tmp_path / "pythia-14m")
    assert Config.from_checkpoint(tmp_path / "pythia-14m") == config
    with pytest.raises(FileNotFoundError, match="give --model_name"):
        convert_hf_checkpoint(tmp_path / "unknown")
    convert_hf_checkpoint(tmp_path / "unknown", model_name="pythia-14m")
    assert Config.from_checkpoint(tmp_path / "unknown") == config


def test_a_name_that_does_not_fit_the_weights_is_refused_and_nothing_written(hf_model, tmp_path):
    with pytest.raises(ValueError, match="wrong shape or type: "):
        convert_hf_checkpoint(tmp_path / "hf", model_name="SmolLM2-135M")
    assert not (tmp_path / "hf" / "lit_model.pth").exists()


def test_training_state_is_left_out(tmp_path):
    model = GPT(Config.from_name("pythia-14m", **PYTHIA)).eval()
    save_litgpt(model, tmp_path / "run")
    state = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]},
        "hparams": {"out_dir": Path("out"), "seed": 3},
        "iter_num": 7,
    }
    torch.save(state, tmp_path / "run" / "lit_model.pth")
    convert_pretrained_checkpoint(tmp_path / "run", tmp_path / "out")
    written = torch.load(tmp_path / "out" / "lit_model.pth", weights_only=True)
    torch.testing.assert_close(written, dict(model.state_dict()), atol=0, rtol=0)
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_pretrained_checkpoint(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "lit_model.pth").unlink()  # as a conversion that was killed
    convert_pretrained_checkpoint(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "lit_model.pth").is_file()


@pytest.mark.parametrize("command", ["convert_to_litgpt", "convert_from_litgpt", "convert_pretrained_checkpoint"])
def test_an_empty_folder_is_one_line_and_a_failure(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    extra = [] if command == "convert_to_litgpt" else [str(tmp_path / "out")]
    assert main([command, str(tmp_path / "empty"), *extra]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "holds no weights" in captured.err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_converting_many_files_holds_about_one_of_them_in_memory(tmp_path):
    code = """
import pathlib, sys, torch
from litgpt.checkpoint import *
from litgpt.checkpoint import files
from litgpt.checkpoint.export import save_huggingface
hf, lit, back = map(pathlib.Path, sys.argv[1:])
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
save_litgpt(open_checkpoint(hf / "tiny"), lit / "tiny")
save_huggingface(open_checkpoint(lit / "tiny"), back / "tiny")
files._REMAP_BYTES = 20_000_000
before = peak()
save_litgpt(open_checkpoint(hf / "large"), lit / "large")
save_huggingface(open_checkpoint(lit / "large"), back / "large", shard_bytes=20_000_000)
print(peak() - before)
"""
    sizes = {"num_attention_heads": 4, "vocab_size": 5_000, "intermediate_size": 1500, "tie_word_embeddings": True}
    for name, width, layers in (("tiny", 16, 1), ("large", 512, 12)):
        config = transformers.LlamaConfig(hidden_size=width, num_hidden_layers=layers, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf" / name, max_shard_size="20MB")
    from subprocess import run

    total = sum(file.stat().st_size for file in (tmp_path / "hf" / "large").glob("*.safetensors")) / 1e6
    folders = [tmp_path / name for name in ("hf", "lit", "back")]
    done = run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert total > 150
    assert float(done.stdout) < 60
    shutil.rmtree(tmp_path / "hf")
