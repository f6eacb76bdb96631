import json
import pickle
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from litgpt.checkpoint import load_model, open_checkpoint, save_litgpt
from litgpt.checkpoint.files import write_safetensors, write_state_dict
from litgpt.config import Config
from litgpt.model import GPT


@pytest.fixture
def hf_folder(tmp_path):
    save_tiny("llama", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def lit_folder(tmp_path):
    config = Config.from_name("pythia-14m", n_layer=2, n_embd=16, vocab_size=20, block_size=8, padding_multiple=4)
    save_litgpt(GPT(config), tmp_path / "lit")
    return tmp_path / "lit"


def edit_config(folder, **changes):
    """Changes values of `config.json`."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def message_of(error, path):
    """The message, after checking that it is one line of reasonable length that names the path."""
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# -- what a checkpoint offers


def test_tensors_are_the_complete_parameters_by_our_names(hf_folder):
    checkpoint = open_checkpoint(hf_folder)
    expected = GPT(checkpoint.config).state_dict()
    found = dict(checkpoint.tensors())
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    stored = load_file(hf_folder / "model.safetensors")
    parts = [stored[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    torch.testing.assert_close(found["transformer.h.1.attn.qkv.weight"], torch.cat(parts), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_file_and_of_the_model_unless_asked_otherwise(dtype, tmp_path):
    save_tiny("llama", tmp_path, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    assert {p.dtype for p in load_model(checkpoint).parameters()} == {dtype}
    assert {p.dtype for p in load_model(checkpoint, dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize("case", ["llama tied", "gemma", "qwen2 tied"])
def test_tied_embeddings_share_memory(case, tmp_path):
    save_tiny(case, tmp_path / "hf")
    assert "lm_head.weight" in dict(open_checkpoint(tmp_path / "hf").tensors())
    save_litgpt(open_checkpoint(tmp_path / "hf"), tmp_path / "lit")
    for folder in (tmp_path / "hf", tmp_path / "lit"):
        model = load_model(folder)
        assert model.lm_head.weight is model.transformer.wte.weight


def test_untied_embeddings_do_not_share_memory(hf_folder):
    model = load_model(hf_folder)
    assert model.lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize("stored", ["equal", "different", "none"])
@pytest.mark.parametrize("said", [True, False, None])
def test_a_head_of_its_own_in_the_file_counts_whatever_the_config_says(said, stored, tmp_path):
    save_tiny("llama tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    if stored != "none":
        weights["lm_head.weight"] = embedding.clone() if stored == "equal" else torch.randn_like(embedding)
    save_file(weights, tmp_path / "model.safetensors")
    edit_config(tmp_path, tie_word_embeddings=said)
    if said is False and stored == "none":
        with pytest.raises(ValueError, match="missing: lm_head.weight"):
            load_model(tmp_path)
        return
    model = load_model(tmp_path)
    torch.testing.assert_close(model.lm_head.weight.detach(), weights.get("lm_head.weight", embedding))
    shared = model.lm_head.weight is model.transformer.wte.weight
    assert shared == (said is not False and stored != "different")


def test_the_model_does_not_change_when_the_file_does(hf_folder):
    model = load_model(hf_folder)
    before = model.transformer.wte.weight.detach().clone()
    with open(hf_folder / "model.safetensors", "r+b") as file:
        file.seek(-400, 2)
        file.write(b"\0" * 400)
    torch.testing.assert_close(model.transformer.wte.weight.detach(), before)


def test_eos_ids_come_from_both_files(hf_folder):
    (hf_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    config = json.loads((hf_folder / "config.json").read_text()) | {"eos_token_id": 2}
    (hf_folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(hf_folder).eos_ids == [7, 8, 2]


def test_sharded_files_and_pickled_ones_give_the_same_model(tmp_path):
    reference = save_tiny("qwen2", tmp_path / "one")
    save_tiny("qwen2", tmp_path / "many", max_shard_size="5KB")
    assert len(open_checkpoint(tmp_path / "many").files) > 3
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "bin")
    torch.save(reference.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "old")
    torch.save(reference.state_dict(), tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    expected = load_model(tmp_path / "one").state_dict()
    for folder in ("many", "bin", "old"):
        torch.testing.assert_close(load_model(tmp_path / folder).state_dict(), expected, atol=0, rtol=0)
        tensors = dict(open_checkpoint(tmp_path / folder).tensors())
        torch.testing.assert_close(tensors, dict(expected), atol=0, rtol=0)


@pytest.mark.parametrize(
    "rename",
    [
        {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {"model.": "model.language_model."},
    ],
)
def test_the_text_part_of_a_multimodal_gemma_is_found_under_either_name(rename, tmp_path):
    reference = save_tiny("gemma3_text", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        old, new = next((pair for pair in rename.items() if name.startswith(pair[0])), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    renamed["vision_tower.patch.weight"] = torch.zeros(1)
    save_file(renamed, tmp_path / "model.safetensors")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(load_model(tmp_path)(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)


def test_checkpoints_from_before_qkv_was_renamed_load(lit_folder):
    weights = torch.load(lit_folder / "lit_model.pth")
    expected = load_model(lit_folder).state_dict()
    G, D = 4, 4  # pythia: one key/value head for each query head
    for name in [name for name in weights if ".attn.qkv." in name]:
        qkv = weights.pop(name).unflatten(0, (3, G, D))
        weights[name.replace(".qkv.", ".attn.")] = qkv.transpose(0, 1).flatten(0, 2).contiguous()
    torch.save({"model": weights}, lit_folder / "lit_model.pth")
    torch.testing.assert_close(load_model(lit_folder).state_dict(), expected, atol=0, rtol=0)
    tensors = dict(open_checkpoint(lit_folder).tensors())
    torch.testing.assert_close(tensors, dict(expected), atol=0, rtol=0)


# -- what cannot be opened


def test_a_missing_or_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: expected lit_model.pth, \*.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "note.txt").touch()
    with pytest.raises(ValueError, match="give the folder"):
        open_checkpoint(tmp_path / "note.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"several .gguf files \(a.gguf, b.gguf\)"):
        open_checkpoint(tmp_path)


def test_a_folder_without_its_config_or_its_weights_is_named(hf_folder, lit_folder):
    (lit_folder / "model_config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"lit_model.pth but no model_config.yaml") as error:
        load_model(lit_folder)
    message_of(error, lit_folder)
    shutil.move(hf_folder / "model.safetensors", hf_folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors") as error:
        load_model(hf_folder)
    message_of(error, hf_folder)
    shutil.move(hf_folder / "elsewhere", hf_folder / "model.safetensors")
    (hf_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json") as error:
        load_model(hf_folder)
    message_of(error, hf_folder)


@pytest.mark.parametrize("size", [0, 5, 200, -50])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "pth"])
def test_a_truncated_file_is_named(kind, size, hf_folder, lit_folder):
    folder = lit_folder if kind == "pth" else hf_folder
    path = folder / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "pth": "lit_model.pth"}[kind]
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), path)
        (folder / "model.safetensors").unlink()
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match="damaged or incomplete|was not loaded") as error:
        load_model(folder)
    assert len(message_of(error, path)) < 500


def test_an_index_that_names_a_missing_shard_names_it(tmp_path):
    save_tiny("llama", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name) as error:
        load_model(tmp_path)
    message_of(error, tmp_path)


class Evil:
    def __reduce__(self):
        return eval, ("open('executed', 'w')",)


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(kind, lit_folder, monkeypatch):
    monkeypatch.chdir(lit_folder)
    if kind == "zip":
        torch.save({"lm_head.weight": Evil()}, lit_folder / "lit_model.pth")
    else:
        (lit_folder / "lit_model.pth").write_bytes(pickle.dumps({"lm_head.weight": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="was not loaded: it holds an object of type .*eval") as error:
        load_model(lit_folder)
    message_of(error, lit_folder / "lit_model.pth")
    assert not (lit_folder / "executed").exists()


@pytest.mark.parametrize(
    "content", [{"step": 3}, [torch.zeros(1)], {5: torch.zeros(1)}, {"a": torch.zeros(1).to_sparse()}]
)
def test_a_file_that_is_no_state_dict_is_named(content, lit_folder):
    torch.save(content, lit_folder / "lit_model.pth")
    with pytest.raises(ValueError, match="must hold a state dict") as error:
        load_model(lit_folder)
    message_of(error, lit_folder / "lit_model.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma9"}, "Architecture 'gemma9' is not supported.*nearest supported: gemma"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported for llama, only 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' are not supported"),
        ({"num_attention_heads": 5}, "hidden_size = 32 must be a multiple of num_attention_heads = 5"),
    ],
)
def test_a_config_that_cannot_be_computed_is_named_before_weights_are_read(changes, message, hf_folder):
    config = json.loads((hf_folder / "config.json").read_text()) | changes
    config.pop("head_dim")
    (hf_folder / "config.json").write_text(json.dumps(config))
    (hf_folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        load_model(hf_folder)


def test_all_missing_extra_and_misshapen_weights_are_named_at_once(hf_folder):
    stored = load_file(hf_folder / "model.safetensors")
    del stored["model.norm.weight"], stored["model.layers.0.self_attn.k_proj.weight"]
    stored["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    stored["model.surprise"] = torch.zeros(3)
    stored["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(stored, hf_folder / "model.safetensors")
    with pytest.raises(ValueError, match="missing: ") as error:
        load_model(hf_folder)
    message = message_of(error, hf_folder)
    assert "missing: transformer.ln_f.weight;" in message
    assert "not expected: " in message
    assert "transformer.h.0.attn.qkv.bias" in message
    assert "model.surprise" in message
    assert "transformer.h.2.mlp.fc_2.weight (48, 31) for (48, 32)" in message
    assert "transformer.h.0.attn.qkv.weight 48 rows for 64" in message


def test_a_litgpt_folder_whose_weights_do_not_fit_its_config_says_so(lit_folder):
    values = yaml.safe_load((lit_folder / "model_config.yaml").read_text()) | {"n_layer": 3}
    (lit_folder / "model_config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"missing: transformer.h.2.norm_1.weight") as error:
        load_model(lit_folder)
    message_of(error, lit_folder)


def test_a_checkpoint_without_a_tokenizer_opens_and_names_it_when_asked(hf_folder):
    with pytest.raises(FileNotFoundError, match="tokenizer") as error:
        open_checkpoint(hf_folder).tokenizer()
    message_of(error, hf_folder)


# -- writing


def test_a_failed_write_leaves_the_old_files_and_no_others(hf_folder, lit_folder):
    before = {file.name: file.read_bytes() for file in lit_folder.iterdir()}
    stored = load_file(hf_folder / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, hf_folder / "model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        save_litgpt(open_checkpoint(hf_folder), lit_folder)
    assert {file.name: file.read_bytes() for file in lit_folder.iterdir()} == before


def breaking_off(*first):
    yield first
    raise OSError("the disk is full")


def test_a_write_that_breaks_off_leaves_nothing_behind(tmp_path):
    layout = {"weight": torch.zeros(3)}
    with pytest.raises(OSError, match="disk is full"):
        write_state_dict(tmp_path / "lit_model.pth", layout, breaking_off("weight", 0, torch.ones(3)))
    with pytest.raises(OSError, match="disk is full"):
        write_safetensors(tmp_path, {"model.safetensors": layout}, breaking_off("weight", torch.ones(3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["gpt_neox", "phi3", "mixtral", "falcon 40b"])
def test_a_converted_folder_is_the_same_model_in_the_asked_dtype(case, tmp_path):
    save_tiny(case, tmp_path / "hf")
    expected = load_model(tmp_path / "hf")
    save_litgpt(open_checkpoint(tmp_path / "hf"), tmp_path / "lit")
    model = load_model(tmp_path / "lit")
    assert model.config == expected.config
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)
    save_litgpt(open_checkpoint(tmp_path / "lit"), tmp_path / "half", dtype=torch.bfloat16)
    half = torch.load(tmp_path / "half" / "lit_model.pth", weights_only=True)
    torch.testing.assert_close(half, dict(expected.to(torch.bfloat16).state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_named(dtype, hf_folder):
    weights = load_file(hf_folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name].to(dtype)}, hf_folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"attn.qkv.weight of {str(dtype)[6:]}"):
        load_model(hf_folder)


def test_what_an_interrupted_command_has_left_is_called_incomplete(lit_folder):
    (lit_folder / "lit_model.pth").unlink()
    with pytest.raises(FileNotFoundError, match="is incomplete: it holds model_config.yaml but no weights"):
        open_checkpoint(lit_folder)
