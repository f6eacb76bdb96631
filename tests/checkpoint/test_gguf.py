"""GGUF files written here from small random models of `transformers`, and the real ones."""

import gc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.checkpoint import load_model, open_checkpoint
from litgpt.checkpoint.gguf import GGUFCheckpoint
from litgpt.checkpoint.gguf_file import GGUFFile
from litgpt.checkpoint.weights import WeightMap
from litgpt.families import family_of
from litgpt.generate.base import generate
from litgpt.rope import build_rope_cache
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.tokenizer import Tokenizer

LICENCE = Path(__file__).parents[2] / "LICENSE"
LARGER = {"intermediate_size": 64, "vocab_size": 96}  # rows that are whole blocks of every quantisation used here
# tiny model -> GGUF architecture, settings to change: attention's scale is not in GGUF
CASES = {
    "llama": ("llama", LARGER | {"rms_norm_eps": 1e-2}),
    "llama tied": ("llama", {}),
    "llama head_dim": ("llama", {}),
    "llama biases": ("llama", {}),
    "llama linear rope": ("llama", {}),
    "llama 3 rope": ("llama", {}),
    "llama yarn": ("llama", {}),
    "smollm3": ("smollm3", {}),
    "phi3 long": ("phi3", {}),
    "phi3 long, short text": ("phi3", {"rope_parameters": tiny_models.LONGROPE}),
    "mistral": ("llama", {}),
    "mixtral": ("llama", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3", {"query_pre_attn_scalar": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3moe", {}),
    "phi3": ("phi3", {}),
    "phi3 window": ("phi3", {}),
    "phi4-mini": ("phi3", {}),
    "olmo2": ("olmo2", {}),
}


def random_model(case):
    model_type, values = tiny_models.CASES[case]
    config = transformers.CONFIG_MAPPING[model_type](**values | CASES[case][1])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        gain = "norm" in name and "gemma" not in model_type
        torch.nn.init.normal_(parameter, mean=float(gain), std=0.3)
    return model


def write_gguf(path, case, model, kind=GGMLQuantizationType.F32, **metadata):
    """Follows llama.cpp's converter: its tensor names, its order of q and k rows, its norm weights."""
    arch, config = CASES[case][0], model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        for reach in ("short", "long"):
            writer.add_tensor(f"rope_factors_{reach}.weight", torch.tensor(rope[f"{reach}_factor"]).numpy())
    if rope["rope_type"] == "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if arch == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in metadata.items():
        del_key(writer, key)
        writer.add_key_value(key, value, kind_of(value), kind_of(value[0]) if isinstance(value, list) else None)
    which = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(which, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        if arch in ("llama", "smollm3") and part in heads:
            tensor = tensor.view(heads[part], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensors = {theirs: tensor}
        if ".experts." in name:
            block = "blk." + name.split(".")[2]
            tensors = {f"{block}.ffn_down_exps.weight": tensor}
            if "gate_up" in name:
                gate, up = tensor.chunk(2, dim=1)
                tensors = {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        for theirs, value in tensors.items():
            value = value.float().numpy()
            stored = kind if value.ndim > 1 and theirs else GGMLQuantizationType.F32
            writer.add_tensor(theirs, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def del_key(writer, key):
    for table in writer.kv_data:
        table.pop(key, None)


def kind_of(value):
    kinds = {bool: "BOOL", int: "INT64", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return gguf.GGUFValueType[kinds[type(value)]]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_model_that_the_file_was_written_from(case, tmp_path):
    theirs = random_model(case)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", case, theirs))
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert checkpoint.tied == theirs.config.tie_word_embeddings
    assert checkpoint.dtype == torch.float32
    assert checkpoint.config.block_size == theirs.config.max_position_embeddings
    ours = load_model(checkpoint)
    tokens = torch.randint(70, (2, 24))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == checkpoint.tied


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "mixtral", "phi3"])
def test_tensors_are_whole_and_complete(case, tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", case, random_model(case)))
    expected = {name: tensor.shape for name, tensor in load_model(checkpoint).state_dict().items()}
    assert {name: tensor.shape for name, tensor in checkpoint.tensors()} == expected
    assert all(piece.is_meta for _, _, piece in checkpoint.row_shards(meta=True))


def test_a_file_is_closed_with_its_last_tensor(tmp_path, recwarn):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    file = GGUFFile(path)
    tensor = file.tensors["output.weight"]
    held = tensor.file
    del file
    gc.collect()
    assert not held.closed
    del tensor, held
    gc.collect()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


def test_gemma_sliding_window_is_read(tmp_path):
    config = GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", "gemma3_text", random_model("gemma3_text"))).config
    assert [config.window(i) for i in range(7)] == [4, 4, 4, 4, 4, None, 4]


def test_model_is_named_after_the_file_without_its_quantisation(tmp_path):
    model = random_model("llama")
    for stem in ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct-q4_k_m", "SmolLM2-135M-Instruct-f16"):
        assert GGUFCheckpoint(write_gguf(tmp_path / f"{stem}.gguf", "llama", model)).config.name == stem[:21]


def write_one(path, raw, kind):
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("other.weight", np.arange(5, dtype=np.float32))
    writer.add_tensor("x.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
KINDS += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_type_reads_as_the_gguf_package_reads_it(kind, tmp_path):
    kind = GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 120, (3, 2 * nbytes), dtype=np.uint8)
    file = write_one(tmp_path / "one.gguf", raw, kind)
    value = file.read("x.weight")
    assert value.shape == (3, 2 * block) == file.read("x.weight", meta=True).shape
    assert value.dtype == file.read("x.weight", meta=True).dtype
    assert torch.equal(value.float(), torch.from_numpy(gguf.quants.dequantize(raw, kind)))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    file = write_one(tmp_path / "one.gguf", np.zeros((2, 40), dtype=np.uint8), GGMLQuantizationType.Q8_1)
    with pytest.raises(ValueError, match="stores 'x.weight' as Q8_1, which cannot be dequantised"):
        file.read("x.weight")


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F16", 3e-4), ("BF16", 3e-3), ("Q4_0", 0.11), ("Q4_1", 0.1), ("Q5_0", 0.055), ("Q5_1", 0.05), ("Q8_0", 0.007)],
)
def test_quantised_weights_stay_close_to_the_original(kind, error, tmp_path):
    theirs = random_model("llama")
    exact = load_model(write_gguf(tmp_path / "exact.gguf", "llama", theirs)).state_dict()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", "llama", theirs, GGMLQuantizationType[kind]))
    assert checkpoint.dtype == (torch.float16 if kind == "F16" else torch.bfloat16)
    for name, weight in load_model(checkpoint, torch.float32).state_dict().items():
        difference = (weight - exact[name]).norm() / exact[name].norm()
        assert difference < error
        assert (difference > 0) == (weight.dim() > 1)


@pytest.mark.real_model
def test_metadata_equal_those_of_the_gguf_package(default_gguf):
    file, reader = GGUFFile(default_gguf), GGUFReader(default_gguf)
    assert file.metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.tensors.keys() == {tensor.name for tensor in reader.tensors}


def fill(model, config, tensors):
    """Puts our tensors into a model of `transformers`, q, k and v apart again."""
    weight_map = WeightMap(family_of(config), config)
    for name, parameter in model.state_dict().items():
        for ours, row, part in weight_map.place(name, parameter):
            part.copy_(tensors[ours][row : row + len(part)])
    return model.eval()


@pytest.mark.real_model
@torch.inference_mode()
def test_default_model_answers_like_transformers_on_the_same_weights(default_gguf):
    checkpoint = open_checkpoint(default_gguf)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    theirs = fill(transformers.LlamaForCausalLM(config), checkpoint.config, dict(checkpoint.tensors()))
    ours = load_model(checkpoint, torch.float32)
    tokenizer = checkpoint.tokenizer()
    prompt = checkpoint.prompt_style().apply("What is the capital of France?")
    tokens = tokenizer.encode(prompt).long()[None]
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-3)
    answer = theirs.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=checkpoint.eos_ids)
    assert tokenizer.decode(answer[0, tokens.shape[1] :]) == "The capital of France is Paris."


@pytest.fixture(scope="module")
def gemma(gemma_gguf):
    """Ours, and that of `transformers` with the same weights; a tokenizer."""
    checkpoint = open_checkpoint(gemma_gguf)
    config = transformers.Gemma3TextConfig(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        sliding_window=512,
    )
    ours = load_model(checkpoint, torch.float32)
    with torch.device("meta"):
        theirs = transformers.Gemma3ForCausalLM(config)
    theirs = fill(theirs.to_empty(device="cpu"), checkpoint.config, ours.state_dict())
    # what is no weight, and so was not filled
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    theirs.model.embed_tokens.embed_scale.fill_(640**0.5)
    return ours, theirs, checkpoint.tokenizer()


@pytest.mark.real_model
@torch.inference_mode()
def test_gemma_equals_transformers_on_the_same_weights_past_its_window(gemma):
    ours, theirs, tokenizer = gemma
    text = "Water boils at 100 degrees. The river runs through the old town, and the bridge is made of stone. " * 30
    tokens = tokenizer.encode(text).long()[None, :640]
    assert tokens.shape[1] == 640
    expected = theirs(tokens, logits_to_keep=8).logits
    torch.testing.assert_close(ours(tokens)[:, -8:], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("length", "chunksize", "answer"),
    [
        (600, 250, "agent by the copyright owner or by an"),
        (1100, 333, "must not, without the prior written consent of"),
    ],
)
def test_gemma_generates_sensible_english_past_its_window_as_transformers_does(gemma, length, chunksize, answer):
    ours, theirs, tokenizer = gemma
    prompt = tokenizer.encode(LICENCE.read_text("utf-8")).long()[:length]
    new = 10
    with torch.inference_mode():
        expected = theirs.generate(prompt[None], max_new_tokens=new, do_sample=False, eos_token_id=None)[0, length:]
    assert " ".join(tokenizer.decode(expected).split()) == answer
    for prompt_chunksize in (None, chunksize):
        found = generate(ours, prompt, length + new, prompt_chunksize, temperature=0.0, include_prompt=False)
        assert found.tolist() == expected.tolist()
    assert min(cache.cache_length for cache in ours.kv_caches()) < 1024


def damaged(path, case):
    write_gguf(path, "llama", random_model("llama"))
    data = bytearray(path.read_bytes())
    changes = {
        "empty": lambda: data[:0],
        "not GGUF": lambda: b"PK\x03\x04" + data[4:],
        "version": lambda: data[:4] + (1).to_bytes(4, "little") + data[8:],
        "header cut": lambda: data[:200],
        "tensors cut": lambda: data[:-100],
        "counts": lambda: data[:8] + b"\xff" * 16 + data[24:],
        "string length": lambda: data[:24] + b"\xff" * 8 + data[32:],
        "architecture": lambda: data.replace(b"llama", b"mamba"),
        "sizes": lambda: data.replace(b"llama.embedding_length", b"llama.embedding_lengtg"),
        "tensor name": lambda: data.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"),
    }
    path.write_bytes(changes[case]())
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", "is not a GGUF file"),
        ("not GGUF", "is not a GGUF file: it begins with b'PK"),
        ("version", "has GGUF version 1"),
        ("header cut", "is truncated or damaged"),
        ("tensors cut", "is truncated: "),
        ("counts", "is truncated or damaged"),
        ("string length", "is truncated or damaged"),
        ("architecture", "architecture 'mamba' is not supported; supported: llama, gemma"),
        ("sizes", "lacks llama.embedding_length"),
        ("tensor name", "'blk.1.ffn_xx.weight' is not known"),
    ],
)
def test_a_damaged_file_is_one_clear_line(case, message, tmp_path):
    path = damaged(tmp_path / "tiny.gguf", case)
    with pytest.raises(ValueError, match=message) as error:
        load_model(open_checkpoint(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blk.1.attn_q.", b"blk.1.attn_v.").replace(b"blk.1.ffn_up", b"blk.1.attn_q", 1))
    with pytest.raises(ValueError, match="two tensors of one name"):
        load_model(path)
    path.write_bytes(whole.replace(b"blk.1.attn_v.", b"blk.1.attn_x.").replace(b"blk.1.ffn_up.", b"blk.1.attn_v."))
    with pytest.raises(ValueError, match=r"'blk\.1\.attn_x\.weight' is not known"):
        load_model(path)


def split(folder, case, **options):
    """The same model in one file and in several parts, as llama.cpp's tools split it."""
    theirs = random_model(case)
    whole = write_gguf(folder / "whole" / "tiny.gguf", case, theirs)
    reader = GGUFReader(whole)
    writer = GGUFWriter(folder / "parts" / "tiny-q8_0.gguf", CASES[case][0], split_max_tensors=4, **options)
    for name, value in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, value.contents(), value.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole, sorted((folder / "parts").iterdir())


@pytest.fixture
def split_model(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    return split(tmp_path, "llama")


@pytest.mark.parametrize("small_first", [False, True])
def test_any_part_of_a_split_file_and_its_folder_stand_for_the_model(small_first, tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = split(tmp_path, "llama", small_first_shard=small_first)
    assert len(parts) > 3
    expected = load_model(whole).state_dict()
    for path in (parts[0], parts[2], parts[-1], parts[0].parent):
        checkpoint = open_checkpoint(path)
        assert checkpoint.files == parts
        assert checkpoint.config.name == "tiny"
        found = load_model(checkpoint).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_missing_and_foreign_parts_are_named(split_model):
    _, parts = split_model
    data = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"is one of 8 shards, of which .* lacks tiny-q8_0-00002-of-00008.gguf$"
    ):
        open_checkpoint(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ValueError, match="00002-of-00008.gguf is not shard 2 of 8, as its name says"):
        open_checkpoint(parts[0])
    parts[1].write_bytes(data[:-40])
    with pytest.raises(ValueError, match="00002-of-00008.gguf is truncated"):
        open_checkpoint(parts[0])
    renamed = parts[0].with_name("mine.gguf")
    parts[0].rename(renamed)
    with pytest.raises(ValueError, match="mine.gguf is one of 8 shards, whose names must end in -00001-of-00008.gguf"):
        open_checkpoint(renamed)


def test_a_folder_with_several_models_asks_for_one_and_a_projector_is_none(split_model):
    whole, parts = split_model
    folder = parts[0].parent
    (folder / "mmproj-tiny-f16.gguf").write_bytes(b"GGUF")
    assert open_checkpoint(folder).files == parts
    whole.rename(folder / "b.gguf")
    with pytest.raises(ValueError, match=r"several \.gguf files \(b.gguf, tiny-q8_0-00001-of-00008.gguf\)"):
        open_checkpoint(folder)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 98362432\n"


LARGE = ["tiny.gguf", "model.safetensors", "pytorch_model.bin", "lit_model.pth", "lit_model_quantized.safetensors"]


@pytest.mark.parametrize("name", [*LARGE, "tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_called_so(name, tmp_path):
    random_model("llama").config.save_pretrained(tmp_path)
    (tmp_path / name).write_text(LFS)
    model = tmp_path / name if name.endswith("gguf") else tmp_path
    if name.startswith("lit_model"):
        (tmp_path / "model_config.yaml").write_text("name: x\n")
    message = (
        f"{name} is a Git LFS pointer, not the file of 98,362,432 bytes .*: run `git lfs pull` in its folder, or down"
    )
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(model) if name.startswith("tokenizer") else load_model(model)
    assert "\n" not in str(error.value)


ROPE = "llama.rope.scaling."
# Metadata -> what transformers calls the same; it is asked for the angles
ROPES = {
    "none": ({}, None),
    "factor zero": ({ROPE + "type": "linear", ROPE + "factor": 0.0}, None),
    "type none": ({ROPE + "type": "none", ROPE + "factor": 4.0}, None),
    "yarn by one": ({ROPE + "type": "yarn", ROPE + "factor": 1.0}, None),
    "yarn by none": ({ROPE + "type": "yarn"}, None),
    "linear": ({ROPE + "type": "linear", ROPE + "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
    "factor alone": ({ROPE + "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "old key": ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "new key first": (
        {"llama.rope.scale_linear": 8.0, ROPE + "factor": 2.0, ROPE + "finetuned": True},
        {"rope_type": "linear", "factor": 2.0},
    ),
    "yarn": (
        {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "original_context_length": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "yarn without original": (
        {ROPE + "type": "yarn", ROPE + "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn betas": (
        {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "original_context_length": 16}
        | {ROPE + "yarn_beta_fast": 4.0, ROPE + "yarn_beta_slow": 0.5, ROPE + "yarn_ext_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.5},
    ),
    "yarn attention": (
        {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "original_context_length": 16, ROPE + "attn_factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.56931471806},
    ),
    "yarn multiplier": (
        {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "original_context_length": 16}
        | {ROPE + "yarn_log_multiplier": 0.707},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0}
        | {"mscale_all_dim": 0.707},
    ),
    "yarn that extrapolates nothing": (
        {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "yarn_ext_factor": 0.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "linear that extrapolates": (
        {ROPE + "type": "linear", ROPE + "factor": 4.0, ROPE + "yarn_ext_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
}


def rope_of(config):
    return build_rope_cache(
        40, config.rope_n_elem, None, config.rope_base, config.rope_condense_ratio, config.rope_adjustments
    )


@pytest.mark.parametrize("case", ROPES)
def test_rope_settings_mean_what_they_mean_to_llama_cpp(case, tmp_path):
    metadata, scaling = ROPES[case]
    config = GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), **metadata)).config
    values = tiny_models.CASES["llama"][1] | CASES["llama"][1] | {"max_position_embeddings": 64}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0} | (scaling or {})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**values))
    for found, expected in zip(rope_of(config), theirs(torch.ones(1), torch.arange(40)[None]), strict=True):
        torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", [{}, {ROPE + "factor": 3.0}])
def test_attention_factor_without_yarn_multiplies_cosines_and_sines(scaling, tmp_path):
    plain = GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", "llama", random_model("llama"), **scaling)).config
    metadata = scaling | {ROPE + "attn_factor": 0.75}
    scaled = GGUFCheckpoint(write_gguf(tmp_path / "b.gguf", "llama", random_model("llama"), **metadata)).config
    for found, expected in zip(rope_of(scaled), rope_of(plain), strict=True):
        torch.testing.assert_close(found, 0.75 * expected)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count": 0}, "llama.attention.head_count = 0 must be positive"),
        ({"llama.attention.head_count_kv": 0}, "llama.attention.head_count_kv = 0 must be positive"),
        ({"llama.attention.head_count_kv": 3}, "llama.attention.head_count_kv = 3 does not divide 4 heads"),
        ({"llama.block_count": "2"}, "llama.block_count = '2' must be a whole number"),
        ({"llama.block_count": 10**9}, "llama.block_count = 1000000000 does not fit the file, .* 3 layers"),
        ({"llama.block_count": 0}, "llama.block_count = 0 must be positive"),
        ({"llama.context_length": -5}, "llama.context_length = -5 must be finite and not negative"),
        ({"llama.context_length": 64.0}, "llama.context_length = 64.0 must be a whole number"),
        (
            {"llama.embedding_length": 48},
            r"llama.embedding_length = 48 does not fit token_embd.weight of shape \(96, 32\)",
        ),
        ({"llama.embedding_length": True}, "llama.embedding_length = True must be a whole number"),
        ({"llama.feed_forward_length": [64, 32]}, r"feed_forward_length = \[64, 32\] differs between layers"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon = nan must be finite"),
        ({"llama.attention.layer_norm_rms_epsilon": "1e-5"}, "layer_norm_rms_epsilon = '1e-5' must be a number"),
        ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base = 0.0 must be positive"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base = inf must be finite"),
        ({"llama.rope.dimension_count": 10}, "llama.rope.dimension_count = 10 must be even, and from 2 to 8"),
        ({"llama.rope.dimension_count": 3}, "llama.rope.dimension_count = 3 must be even"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length = 4 is not supported, only 8"),
        ({ROPE + "type": "dynamic"}, "rope.scaling.type = 'dynamic' is not supported, only none, linear, yarn"),
        ({ROPE + "type": "longrope"}, "needs the tensors rope_factors_long"),
        ({ROPE + "factor": "4"}, "rope.scaling.factor = '4' must be a number"),
        ({ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5 is not"),
        ({ROPE + "alpha": 3.0}, "llama.rope.scaling.alpha = 3.0 is not known, and may change what the model computes"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5 is not supported"),
        ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported for the architecture"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ({"llama.logit_scale": 0.25}, "llama.logit_scale = 0.25 is not supported"),
        ({"llama.attention.causal": False}, "llama.attention.causal = False is not supported"),
        ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv = 8.0 is not supported"),
        ({"llama.unheard_of": [1, 2]}, r"llama.unheard_of = \[1, 2\] is not known"),
    ],
)
def test_settings_that_cannot_be_computed_are_one_line_with_their_key(metadata, message, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), **metadata)
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.vocab_size": 5, "llama.tensor_data_layout": "Meta AI original pth", ROPE + "finetuned": False},
        {"llama.attention.value_length": 8, "llama.attention.causal": True, "llama.logit_scale": 1.0},
        {"llama.attention.head_count_kv": [2, 2], "llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.attention.sliding_window": 0, "llama.attn_logit_softcapping": 0.0, "llama.attention.scale": 8**-0.5},
        {"quantize.imatrix.entries_count": 7, "mine.unheard_of": "x", "general.tags": ["a"]},
    ],
)
def test_settings_that_change_nothing_are_passed_over(metadata, tmp_path):
    plain = GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))).config
    (tmp_path / "other").mkdir()
    path = write_gguf(tmp_path / "other" / "tiny.gguf", "llama", random_model("llama"), **metadata)
    assert GGUFCheckpoint(path).config == plain


def test_a_sliding_window_of_llama_is_mistrals(tmp_path):
    metadata = {"llama.attention.sliding_window": 6}
    config = GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), **metadata)).config
    assert [config.window(i) for i in range(2)] == [6, 6]


@pytest.mark.parametrize(
    ("pattern", "windows"), [(2, [4, None, 4, None, 4, None, 4]), ([True] * 3 + [False] * 4, [4] * 3 + [None] * 4)]
)
def test_the_pattern_of_windows_is_read(pattern, windows, tmp_path):
    metadata = {"gemma3.attention.sliding_window_pattern": pattern, "gemma3.rope.freq_base_swa": 5000.0}
    path = write_gguf(tmp_path / "tiny.gguf", "gemma3_text", random_model("gemma3_text"), **metadata)
    config = GGUFCheckpoint(path).config
    assert [config.window(i) for i in range(7)] == windows
    assert config.rope_local_base_freq == 5000


def test_the_scale_of_attention_is_read_where_there_is_a_choice(tmp_path):
    metadata = {"gemma2.attention.scale": 1 / 24**0.5}
    path = write_gguf(tmp_path / "tiny.gguf", "gemma2", random_model("gemma2"), **metadata)
    assert GGUFCheckpoint(path).config.attention_scores_scalar == 24


def test_rope_factors_that_are_not_llama_3_are_refused(tmp_path):
    model = random_model("llama 3 rope")
    model.config.rope_parameters["high_freq_factor"] = 2.0
    path = write_gguf(tmp_path / "tiny.gguf", "llama 3 rope", model)
    with pytest.raises(ValueError, match="rope_freqs.weight does not follow Llama 3's rule"):
        _ = open_checkpoint(path).config


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", random_model("llama"))


@given(st.lists(st.tuples(st.integers(4, 3500), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=80)
def test_wrong_bytes_in_the_header_are_one_line_or_harmless(whole_file, changes):
    path, changed = whole_file.with_name("changed.gguf"), bytearray(whole_file.read_bytes())
    for place, byte in changes:
        changed[place] = byte
    path.write_bytes(changed)
    said = ""
    try:
        load_model(path)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    assert "\n" not in said


@torch.inference_mode()
def test_a_gguf_file_is_converted_into_a_folder_beside_it(tmp_path):
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [chr(i) for i in range(33, 127)]}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), **tokenizer)
    expected = load_model(path)(torch.arange(9)[None])
    convert_hf_checkpoint(path)
    assert open_checkpoint(tmp_path).files[0].name == "lit_model.pth"
    assert load_model(tmp_path)(torch.arange(9)[None]).equal(expected)
