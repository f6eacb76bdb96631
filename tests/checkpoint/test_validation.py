import json

import pytest
import torch
import transformers
from tiny import tiny_gpt

import litgpt
from litgpt.checkpoint import open_checkpoint, save_litgpt
from litgpt.checkpoint.export import save_huggingface
from litgpt.checkpoint.validation import check_files
from litgpt.config import Config
from litgpt.model import GPT


@pytest.fixture
def sharded(tmp_path):
    """A Hugging Face folder with several files and an index."""
    save_huggingface(tiny_gpt(), tmp_path / "hf", shard_bytes=30_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


def test_all_differences_are_in_the_result(tmp_path):
    model = tiny_gpt()
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    result = litgpt.validate_checkpoint(path, model, verbose=False)
    assert result == litgpt.CheckpointValidationResult(True, [], [], [], [])
    weights = model.state_dict()
    del weights["lm_head.weight"]
    weights |= {"x": torch.ones(1), "transformer.wte.weight": torch.ones(2, 2)}
    torch.save(weights, path)
    result = litgpt.validate_checkpoint(path, model, verbose=False)
    assert not result.is_valid
    assert result.missing_keys == ["lm_head.weight"]
    assert result.unexpected_keys == ["x"]
    assert result.shape_mismatches == ["transformer.wte.weight (2, 2) for (100, 64)"]
    assert result.errors == []


def test_any_kind_of_checkpoint_is_compared(sharded, tmp_path):
    save_litgpt(open_checkpoint(sharded), tmp_path / "lit")
    for path in (sharded, tmp_path / "lit", tmp_path / "lit" / "lit_model.pth"):
        assert litgpt.validate_checkpoint(path, tiny_gpt(), verbose=False).is_valid
        assert not litgpt.validate_checkpoint(path, tiny_gpt(n_embd=32), verbose=False).is_valid


def test_what_cannot_be_read_is_an_error_of_the_result_and_printed(tmp_path, capsys):
    result = litgpt.validate_checkpoint(tmp_path / "no.pth", tiny_gpt())
    assert result.errors == [f"Checkpoint not found: {tmp_path / 'no.pth'} does not exist"]
    assert capsys.readouterr().out == f"{result.summary()}\n"
    assert "Errors (1): Checkpoint not found: " in result.summary()


def test_what_is_no_checkpoint_is_an_error_of_the_result(tmp_path):
    (tmp_path / "x.pth").write_text("text")
    assert "Failed to load" in litgpt.validate_checkpoint(tmp_path / "x.pth", tiny_gpt(), verbose=False).errors[0]


def test_files_that_are_cut_off_are_all_named(sharded):
    whole = check_files(open_checkpoint(sharded))
    files = sorted(sharded.glob("*.safetensors"))
    assert whole == sum(file.stat().st_size for file in files)
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{files[0].name} is damaged.*{files[1].name} is damaged"):
        check_files(open_checkpoint(sharded))


def test_tensors_that_are_not_where_the_index_has_them_are_named(sharded):
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    files = sorted(set(values["weight_map"].values()))
    name = "model.norm.weight"
    values["weight_map"][name] = next(file for file in files if file != values["weight_map"][name])
    index.write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=rf"not in the file where the index has them: {name} \({values['weight_map'][name]}\)"
    ):
        check_files(open_checkpoint(sharded))


def test_a_cut_off_lit_model_is_noticed(tmp_path):
    save_litgpt(tiny_gpt(), tmp_path)
    file = tmp_path / "lit_model.pth"
    assert check_files(open_checkpoint(tmp_path)) == file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"lit_model\.pth is damaged or incomplete"):
        check_files(open_checkpoint(tmp_path))


@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_what_a_model_of_transformers_takes(tied):
    hf = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
        max_position_embeddings=50, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(hf)
    weights = sum(parameter.nbytes for parameter in theirs.parameters())
    found = litgpt.estimate_model_memory(Config.from_hf(hf.to_dict(), name="tiny"), training=True, tied=tied)
    assert found["param_count"] == theirs.num_parameters()
    optimizer = torch.optim.AdamW(theirs.parameters(), foreach=False)
    theirs(torch.ones(1, 50, dtype=torch.long), labels=torch.ones(1, 50, dtype=torch.long)).loss.backward()
    assert found["gradient_bytes"] == sum(parameter.grad.nbytes for parameter in theirs.parameters())
    optimizer.step()
    state = [value for values in optimizer.state.values() for name, value in values.items() if name != "step"]
    assert found["optimizer_bytes"] == sum(value.nbytes for value in state)
    assert found["param_bytes"] == weights
    cache = theirs(torch.ones(1, 50, dtype=torch.long), use_cache=True).past_key_values
    assert found["kv_cache_bytes"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found["kv_cache_bytes_per_token"] * 50 == found["kv_cache_bytes"]


def test_memory_of_caches_is_what_a_model_with_windows_allocates():
    config = Config.from_name("Gemma-3-1b-it", n_layer=7, n_embd=32, intermediate_size=16, vocab_size=50)
    model = GPT(config).to(torch.bfloat16)
    model.set_kv_caches(1)
    found = litgpt.estimate_model_memory(config, "bfloat16")
    assert found["kv_cache_bytes"] == sum(cache.size_estimate()[0] for cache in model.kv_caches()) // 8
    assert found["kv_cache_bytes"] < config.block_size * found["kv_cache_bytes_per_token"] / 3
    assert (found["gradient_bytes"], found["optimizer_bytes"]) == (0, 0)


def test_memory_of_a_large_model_is_told_in_units_of_two_to_the_thirty():
    found = litgpt.estimate_model_memory(Config.from_name("Llama-3.1-70B"), torch.bfloat16, training=True)
    assert found["param_count"] == 70_553_706_496
    assert found["param_memory_gb"] == 131.42
    assert found["estimated_total_gb"] == 525.67


def test_memory_wants_a_floating_point_type():
    with pytest.raises(ValueError, match="dtype 'int8' is no floating-point type"):
        litgpt.estimate_model_memory(tiny_gpt().config, "int8")
