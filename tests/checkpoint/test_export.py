import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import CASES, save_tiny

from litgpt.checkpoint import load_model, open_checkpoint, save_litgpt
from litgpt.checkpoint.export import save_huggingface
from litgpt.config import Config
from litgpt.model import GPT


def stored_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_from_hugging_face_to_litgpt_and_back_is_bitwise_equal_and_transformers_loads_it(case, tmp_path):
    save_tiny(case, tmp_path / "hf", dtype=torch.bfloat16)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    save_litgpt(open_checkpoint(tmp_path / "hf"), tmp_path / "lit")
    (tmp_path / "lit" / "config.json").unlink()  # so that ours is written
    save_huggingface(open_checkpoint(tmp_path / "lit"), tmp_path / "back")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    if case != "gemma3":  # of the multimodal model the text part is exported, under its own names
        before, after = stored_tensors(tmp_path / "hf"), stored_tensors(tmp_path / "back")
        assert before.keys() == after.keys()
        torch.testing.assert_close(after, before, atol=0, rtol=0)
    tokens = torch.randint(70, (1, 24))
    torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, atol=0, rtol=0)


def test_a_large_model_is_written_as_files_with_an_index(tmp_path):
    save_tiny("llama", tmp_path / "hf")
    save_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "out", shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    stored = stored_tensors(tmp_path / "out")
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(stored, stored_tensors(tmp_path / "hf"), atol=0, rtol=0)


def test_what_came_with_the_model_goes_with_it(tmp_path):
    save_tiny("llama", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"eos_token_id": 5, "added_by_hand": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "top_k": 7}))
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    save_litgpt(open_checkpoint(tmp_path / "hf"), tmp_path / "lit")
    save_huggingface(open_checkpoint(tmp_path / "lit"), tmp_path / "back", dtype=torch.float16)
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["eos_token_id"], written["added_by_hand"], written["torch_dtype"]) == (5, 1, "float16")


def test_a_config_that_no_longer_fits_is_written_anew(tmp_path):
    save_tiny("llama", tmp_path / "hf")
    save_litgpt(open_checkpoint(tmp_path / "hf"), tmp_path / "lit")
    stale = json.loads((tmp_path / "lit" / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (tmp_path / "lit" / "config.json").write_text(json.dumps(stale))
    save_huggingface(open_checkpoint(tmp_path / "lit"), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    "name", ["pythia-14m", "Llama-3.2-1B", "Gemma-3-4b-it", "phi-1_5", "Qwen3-30B-A3B", "OLMo-2-1124-7B"]
)
@torch.inference_mode()
def test_a_model_in_memory_is_exported_as_what_its_name_says(name, tmp_path):
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 4, "head_size": 16, "intermediate_size": 24}
    vocab = {"vocab_size": 60, "padded_vocab_size": 64, "block_size": 32}
    experts = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 8} if "A3B" in name else {}
    named = Config.from_name(name)
    if named.head_size == named.n_embd // named.n_head:
        del sizes["head_size"]
    config = Config.from_name(name, **{**sizes, **vocab, **experts})
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_huggingface(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(60, (1, 20))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_tied_model_in_memory_is_exported_as_tied(tmp_path):
    save_tiny("llama tied", tmp_path / "hf")
    save_huggingface(load_model(tmp_path / "hf"), tmp_path / "out")
    assert "lm_head.weight" not in stored_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_nothing_is_written_where_it_cannot_end_well(tmp_path):
    save_tiny("llama", tmp_path / "hf")
    with pytest.raises(FileExistsError, match=r"holds weights already \(model.safetensors\)"):
        save_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "hf")
    odd = GPT(Config(name="odd", n_layer=1, n_embd=8, n_head=2, vocab_size=9, post_mlp_norm=True, norm_2=False))
    with pytest.raises(ValueError, match="No architecture of transformers expresses the model config 'odd'"):
        save_huggingface(odd, tmp_path / "out")
    save_litgpt(open_checkpoint(tmp_path / "hf"), tmp_path / "lit")
    with pytest.raises(FileExistsError, match=r"holds weights already \(lit_model.pth\): give another folder"):
        save_huggingface(open_checkpoint(tmp_path / "lit"), tmp_path / "lit")
    assert not list((tmp_path / "lit").glob("*.safetensors"))
    weights = torch.load(tmp_path / "lit" / "lit_model.pth")
    del weights["transformer.ln_f.weight"]
    torch.save(weights, tmp_path / "lit" / "lit_model.pth")
    with pytest.raises(ValueError, match=r"missing: transformer.ln_f.weight"):
        save_huggingface(open_checkpoint(tmp_path / "lit"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_was_killed_between_two_files_is_done_again(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    save_huggingface(checkpoint, tmp_path / "whole", shard_bytes=20_000)
    replace, renamed = os.replace, []

    def killed(source, target):
        if target.suffix == ".safetensors":
            renamed.append(target)
            if len(renamed) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_huggingface(checkpoint, tmp_path / "out", shard_bytes=20_000)
    monkeypatch.undo()
    assert renamed[0].is_file()
    save_huggingface(checkpoint, tmp_path / "out", shard_bytes=30_000)
    save_huggingface(checkpoint, tmp_path / "expected", shard_bytes=30_000)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        file.name for file in (tmp_path / "expected").iterdir()
    )
    assert stored_tensors(tmp_path / "out").keys() == stored_tensors(tmp_path / "whole").keys()
    with pytest.raises(FileExistsError, match="holds weights already"):
        save_huggingface(checkpoint, tmp_path / "out")


def test_a_file_of_the_user_stays_where_an_export_was_killed(tmp_path):
    save_tiny("llama", tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unfinished_export.json").write_text('{"model.safetensors": true}')
    (tmp_path / "out" / "mine.safetensors").touch()
    with pytest.raises(FileExistsError, match=r"holds weights already \(mine.safetensors\)"):
        save_huggingface(open_checkpoint(tmp_path / "hf"), tmp_path / "out")
    assert (tmp_path / "out" / "mine.safetensors").exists()
