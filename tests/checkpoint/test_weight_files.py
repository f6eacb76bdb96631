import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from litgpt.checkpoint import load_model, open_checkpoint, save_litgpt
from litgpt.checkpoint.weight_files import choose_weight_files, read_weight_map

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"a": SHARDS[0], "b": SHARDS[1]}
BINS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "model.safetensors.index.json", *SHARDS, "pytorch_model.bin"], ["model.safetensors"]),
        (["model.safetensors.index.json", *SHARDS, "model-00001-of-00003.safetensors", "pytorch_model.bin"], SHARDS),
        ([*SHARDS, "pytorch_model.bin"], SHARDS),
        ([*BINS, "training_args.bin"], BINS),
        (["pytorch_model.bin", *BINS], ["pytorch_model.bin"]),
        ([*SHARDS, "model-00003-of-00003.safetensors"], SHARDS),
        (["weights.safetensors", "consolidated.safetensors", "adapter_model.safetensors"], ["weights.safetensors"]),
        (["consolidated.00.safetensors", "optimizer.bin", "adapter_model.bin", "lit_model_quantized.safetensors"], []),
        (["some.bin", "scheduler.bin"], ["some.bin"]),
        (["a-1-of-2.bin", "a-2-of-2.bin", "stray.bin"], ["a-1-of-2.bin", "a-2-of-2.bin"]),
        (["tokenizer.json"], []),
    ],
)
def test_one_set_of_files_is_chosen(names, chosen):
    assert choose_weight_files(names, lambda _: INDEX)[0] == chosen


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (SHARDS[:1], FileNotFoundError, f"of 2 files of weights are missing: {SHARDS[1]}"),
        (["model-00001-of-00900.safetensors"], FileNotFoundError, r"model-00002-of-00900.*\(899 in all\)"),
        (["model.safetensors.index.json", SHARDS[0]], FileNotFoundError, f"names {SHARDS[1]}, not there"),
        (["a-1-of-1.bin", "b-1-of-1.bin"], ValueError, "several sets of weights"),
    ],
)
def test_missing_and_ambiguous_files_are_named(names, error, message):
    with pytest.raises(error, match=message):
        choose_weight_files(names, lambda _: INDEX)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", 7, None, "config.json", "a\0.bin"]
)
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="weight_map.a = ") as error:
        read_weight_map(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}])
def test_an_index_without_a_map_is_named(content, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="weight_map"):
        read_weight_map(path)


def test_of_a_tensor_in_two_files_the_one_that_the_index_names_counts(tmp_path):
    save_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / SHARDS[0])
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / SHARDS[1])
    index = dict.fromkeys(weights, SHARDS[0]) | {"model.norm.weight": SHARDS[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert not load_model(tmp_path).transformer.ln_f.weight.any()


def test_a_folder_is_called_what_it_is_called_however_it_is_given(tmp_path, monkeypatch):
    folder = tmp_path / "pythia-14m"
    save_tiny("gpt_neox", folder)
    (tmp_path / "link").symlink_to(folder)
    (folder / "below").mkdir()
    monkeypatch.chdir(folder)
    for path in (".", "below/..", f"{folder}/", tmp_path / "link", os.path.relpath(folder)):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.name, checkpoint.config.name) == ("pythia-14m", "pythia-14m")


def test_weights_are_written_last(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "hf")

    def killed(*_):
        assert (tmp_path / "lit" / "model_config.yaml").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("litgpt.checkpoint.load.write_state_dict", killed)
    with pytest.raises(KeyboardInterrupt):
        save_litgpt(open_checkpoint(tmp_path / "hf"), tmp_path / "lit")
    assert not (tmp_path / "lit" / "lit_model.pth").exists()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load_model(tmp_path / "lit")


def test_tied_embeddings_train_apart_where_that_is_asked_for(tmp_path):
    save_tiny("llama tied", tmp_path)
    tied, apart = load_model(tmp_path), load_model(tmp_path, tie_embeddings=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert apart.lm_head.weight is not apart.transformer.wte.weight
    torch.testing.assert_close(apart.lm_head.weight, tied.lm_head.weight, atol=0, rtol=0)
