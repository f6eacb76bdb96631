import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gpt
from torch import nn

from litgpt.fingerprint import fingerprint
from litgpt.model import LatentExpansion
from litgpt.runners import quantized_weights as quantize
from litgpt.runners.packed_weights import pack_linears, unpack_linears
from litgpt.runners.quantized_weights import (
    KERNEL_ROWS,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    TiedHead,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    quantize_model,
)

MODES = pytest.mark.parametrize("mode", ["int8", "int4"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MOE = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "intermediate_size": 32}


def quantized_layer(mode, N, K, bias=False, dtype=torch.float32, group_size=32):
    args = (K, N, nn.Parameter(torch.randn(N, dtype=dtype)) if bias else None, dtype)
    layer = Int8Linear(*args) if mode == "int8" else Int4Linear(*args, group_size=group_size)
    layer.set_rows(0, torch.randn(N, K) * 0.1)
    return layer


# --- integers


def test_int8_rounds_to_the_nearest_of_255_multiples_of_a_rows_scale():
    values = torch.randn(7, 40)
    weight, scale = quantize_int8(values)
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(weight.abs().amax(1), torch.full((7,), 127))
    assert (dequantize_int8(weight, scale, torch.float32) - values).abs().le(scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_rounds_to_the_nearest_of_16_numbers_for_each_group(group_size):
    values = torch.randn(5, 256)
    pairs, scale, minimum = quantize_int4(values, group_size)
    assert (pairs.shape, scale.shape, minimum.shape) == ((5, 128), (5, 256 // group_size), (5, 256 // group_size))
    levels = minimum.float().unsqueeze(2) + scale.float().unsqueeze(2) * torch.arange(16)
    nearest = (values.view(5, -1, group_size, 1) - levels.unsqueeze(2)).abs().amin(3)
    rounded = dequantize_int4(pairs, scale, minimum, torch.float32)
    torch.testing.assert_close((rounded - values).abs(), nearest.flatten(1), atol=1e-5, rtol=0)
    assert (rounded - values).square().mean().sqrt() < 0.12


def test_int4_has_the_even_columns_in_the_low_halves():
    values = torch.arange(16.0).repeat(1, 2)
    pairs, scale, minimum = quantize_int4(values)
    assert (scale.item(), minimum.item()) == (1, 0)
    assert pairs.tolist() == [[i | (i + 1) << 4 for i in range(0, 16, 2)] * 2]


def test_int8_quantising_what_was_quantised_changes_nothing():
    layer = quantized_layer("int8", 64, 128)
    before = layer.dequantized(torch.float32)
    layer.set_rows(0, before)
    assert torch.equal(layer.dequantized(torch.float32), before)


@pytest.mark.parametrize("offset", [0, -8])  # as in GGUF's Q4_1 and Q4_0
@pytest.mark.parametrize("highest", [15, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_had_4_bits_keep_their_integers(dtype, highest, offset):
    bits = torch.randint(0, highest + 1, (6, 4, 32))
    bits[..., 0], bits[..., 1] = 0, highest
    scale = (torch.rand(6, 4, 1) * 0.01 + 0.001).half()
    minimum = scale.float() * offset if offset else -torch.rand(6, 4, 1).half().float() * 0.1
    values = (bits * scale.float() + minimum).flatten(1)
    pairs, found, _ = quantize_int4(values.to(dtype))
    assert torch.equal(quantize._bits(pairs, torch.int64).view(6, 4, 32), bits)
    torch.testing.assert_close(found, scale.squeeze(2), rtol=0 if dtype == torch.float32 else 0.01, atol=0)


def test_int4_finds_smaller_errors_than_the_range_of_a_group_gives():
    values = torch.randn(64, 256)
    pairs, scale, minimum = quantize_int4(values)
    error = (dequantize_int4(pairs, scale, minimum, torch.float32) - values).view(64, -1, 32).square().sum(2)
    low, high = values.view(64, -1, 32).aminmax(dim=2)
    step = ((high - low) / 15).half().float().unsqueeze(2)
    first = low.half().float().unsqueeze(2)
    plain = ((values.view(64, -1, 32) - first) / step).round().clamp(0, 15) * step + first
    expected = (plain - values.view(64, -1, 32)).square().sum(2)
    assert (error <= expected * 1.0001).all()
    assert error.sum() < 0.87 * expected.sum()


@MODES
def test_rows_of_zeros_or_of_one_value_are_exact(mode):
    values = torch.stack((torch.zeros(32), torch.full((32,), 0.5)))
    layer = Int8Linear(32, 2) if mode == "int8" else Int4Linear(32, 2)
    layer.set_rows(0, values)
    torch.testing.assert_close(layer.dequantized(torch.float32), values, atol=0, rtol=1e-2 if mode == "int8" else 0)


@MODES
def test_large_weights_are_quantised_in_parts_as_they_are_in_one(mode, monkeypatch):
    layer, values = quantized_layer(mode, 50, 64), torch.randn(40, 64)
    whole = layer.quantized(values)
    monkeypatch.setattr(quantize, "PIECE", 3 * 64)
    layer.set_rows(7, values)
    for name, expected in whole.items():
        assert torch.equal(getattr(layer, name)[7:47], expected)


# --- layers


@pytest.mark.parametrize("kernels", ["ours", "torch's"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, KERNEL_ROWS), (1, KERNEL_ROWS + 1), (4, 20)])
@DTYPES
@MODES
def test_a_quantised_layer_is_a_product_with_its_dequantised_weight(mode, dtype, shape, bias, kernels, monkeypatch):
    if kernels != "ours":
        monkeypatch.setattr(quantize.ops, "available", lambda: False)
    layer = quantized_layer(mode, 128, 96, bias, dtype)
    weight = layer.dequantized(torch.float64)
    if mode == "int4":
        layer.pack()
    x = torch.randn(*shape, 96, dtype=dtype)
    expected = F.linear(x.double(), weight, layer.bias.double() if bias else None)
    exact = dtype == torch.float32
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5 if exact else 0.03, rtol=1e-4 if exact else 0.02)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("kernels", ["ours", "torch's"])
@pytest.mark.parametrize("sizes", [(100, 64), (7, 9), (3, 33), (1, 1)])
@DTYPES
def test_int8_layers_of_any_size(sizes, dtype, kernels, monkeypatch):
    if kernels != "ours":
        monkeypatch.setattr(quantize.ops, "available", lambda: False)
    layer = quantized_layer("int8", *sizes, dtype=dtype)
    x = torch.randn(2, sizes[1], dtype=dtype)
    expected = x.double() @ layer.dequantized(torch.float64).T
    torch.testing.assert_close(layer(x).double(), expected, atol=0.03, rtol=0.03)


@MODES
def test_inputs_need_not_be_contiguous(mode):
    layer = quantized_layer(mode, 64, 64)
    if mode == "int4":
        layer.pack()
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(layer(x[:, -1:]), layer(x)[:, -1:])
    torch.testing.assert_close(layer(x.mT.contiguous().mT), layer(x))


@MODES
def test_gradients_reach_what_comes_before_a_quantised_layer(mode):
    layer = quantized_layer(mode, 64, 32)
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized(torch.float32).sum(0).expand(3, -1))


# --- packing


needs_kernel = pytest.mark.skipif(quantize._kernel_block() is None, reason="no int4 kernel of a known order here")


@needs_kernel
@DTYPES
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packing_keeps_weight_and_state_dict_in_other_order(dtype, group_size, monkeypatch):
    monkeypatch.setattr(quantize.ops, "available", lambda: False)
    layer = quantized_layer("int4", 192, 128, True, dtype, group_size)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weight = layer.dequantized(torch.float32)
    layer.pack()
    assert layer.weight is None
    assert layer.packed.nbytes == before["weight"].nbytes
    assert torch.equal(layer.dequantized(torch.float32), weight)
    for _ in range(2):
        after = layer.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(value.is_contiguous() for value in after.values())
        layer.unpack()
    assert layer.packed is None


@needs_kernel
def test_packed_layers_are_brought_to_other_types_and_filled_anew(monkeypatch):
    monkeypatch.setattr(quantize.ops, "available", lambda: False)
    layer, other = quantized_layer("int4", 64, 64), quantized_layer("int4", 64, 64)
    layer.pack()
    layer.to(torch.bfloat16)
    assert (layer.packed, layer.weight.dtype, layer.dtype) == (None, torch.uint8, torch.bfloat16)
    layer.pack()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.dequantized(torch.float32), other.dequantized(torch.float32))


@needs_kernel
def test_packing_a_model_packs_its_int4_layers_and_it_stays_the_same_model(monkeypatch):
    monkeypatch.setattr(quantize.ops, "available", lambda: False)
    model = tiny_gpt_quantized("int4", bias=True)
    idx, before = torch.randint(0, 100, (1, 9)), fingerprint(model)
    logits, one = model(idx), model(idx[:, :1])
    pack_linears(model)
    assert model.transformer.h[0].attn.qkv.packed is not None
    assert fingerprint(model) == before
    torch.testing.assert_close(model(idx), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(idx[:, :1]), one, atol=1e-4, rtol=1e-4)
    unpack_linears(model)
    assert model.transformer.h[0].attn.qkv.packed is None
    assert torch.equal(model(idx), logits)
    assert fingerprint(tiny_gpt_quantized("int4", bias=True)) != before


def test_what_the_kernel_does_not_take_stays_as_it_is():
    layer = quantized_layer("int4", 100, 64)
    layer.pack()
    assert layer.packed is None


# --- models


@DTYPES
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flags", [{}, {"bias": True, "lm_head_bias": True}, {"mlp_class_name": "GptNeoxMLP"}, MOE])
@MODES
def test_a_quantised_model_computes_with_the_weights_that_it_was_rounded_to(mode, flags, tied, dtype):
    model = tiny_gpt(**flags).to(dtype)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    rounded = copy.deepcopy(model)
    quantize_model(model, mode)
    for name, layer in model.named_modules():
        if isinstance(layer, quantize.QuantizedLinear):
            rounded.get_submodule(name).weight.data = layer.dequantized(dtype)
    if tied:
        assert isinstance(model.lm_head, TiedHead)
        rounded.lm_head.weight = rounded.transformer.wte.weight
    idx = torch.randint(0, 100, (2, 40))
    for T in (1, 7, 40):
        expected = rounded(idx[:, :T]).float()
        error = (model(idx[:, :T]).float() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03)


def test_the_embedding_gathers_dequantised_rows():
    model = tiny_gpt()
    table = model.transformer.wte.weight.clone()
    quantize_model(model, "int4")
    weight, scale = quantize_int8(table)
    idx = torch.tensor([[3, 99, 3]])
    torch.testing.assert_close(model.transformer.wte(idx), (weight * scale[:, None])[idx])


def test_what_becomes_of_the_layers():
    model = tiny_gpt(**MOE, name="other")
    quantize_model(model, "int4")
    block = model.transformer.h[0]
    assert type(model.transformer.wte) is Int8Embedding
    assert type(model.lm_head) is Int8Linear  # 8 bits in mode int4, too
    assert type(block.attn.qkv) is type(block.mlp.experts[0].fc_1) is Int4Linear
    assert type(block.mlp.gate) is nn.Linear  # the router
    assert type(tiny_gpt_quantized("int4", intermediate_size=80).transformer.h[0].mlp.proj) is Int8Linear  # 80 % 32
    assert type(tiny_gpt_quantized("int4", 64, n_embd=96, n_head=2).transformer.h[0].attn.qkv) is Int8Linear


def tiny_gpt_quantized(mode, group_size=32, **flags):
    model = tiny_gpt(**flags)
    quantize_model(model, mode, group_size)
    return model


def test_latent_attention_keeps_the_layer_whose_weight_it_takes_apart():
    latent = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = tiny_gpt(latent_attention=latent, n_query_groups=None)
    quantize_model(model, "int8")
    attention = model.transformer.h[0].attn
    assert type(attention.kv_b_proj) is LatentExpansion
    assert type(attention.q_a_proj) is Int8Linear
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


@MODES
def test_a_model_of_another_type_keeps_its_integers(mode):
    model = tiny_gpt_quantized(mode)
    before = model.transformer.h[0].attn.qkv.dequantized(torch.float64)
    scale = model.transformer.h[0].attn.qkv.scale.dtype
    model.to(torch.bfloat16)
    qkv = model.transformer.h[0].attn.qkv
    assert (qkv.dtype, qkv.scale.dtype, model.dtype) == (torch.bfloat16, scale, torch.bfloat16)
    assert torch.equal(qkv.dequantized(torch.float64), before)
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


@MODES
def test_weights_are_held_once(mode):
    model = tiny_gpt(n_embd=256, n_head=4, intermediate_size=512, padded_vocab_size=512)
    model.lm_head.weight = model.transformer.wte.weight
    count = sum(parameter.numel() for parameter in model.parameters())
    quantize_model(model, mode)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    table = 512 * 256
    # 4 bits, and 2 x 16 bits for 32 of them
    assert held < 1.03 * (count if mode == "int8" else table + (count - table) * (4 + 1) / 8)


@MODES
def test_decoding_with_caches_gives_the_logits_of_one_call(mode):
    model = tiny_gpt_quantized(mode)
    idx = torch.randint(0, 100, (1, 40))
    whole = model(idx)
    model.set_kv_caches(1)
    parts = [model(idx[:, :30], input_pos=0), *(model(idx[:, t : t + 1], input_pos=t) for t in range(30, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_copy_of_a_model_has_a_head_of_its_own():
    model = tiny_gpt()
    model.lm_head.weight = model.transformer.wte.weight
    quantize_model(model, "int8")
    other = copy.deepcopy(model)
    other.transformer.wte.weight.zero_()
    assert other.lm_head.weight is other.transformer.wte.weight
    assert model.lm_head(torch.ones(1, 64)).abs().sum() > 0
    assert other.lm_head(torch.ones(1, 64)).abs().sum() == 0


# --- errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "int3"}, r"^quantize='int3' is not one of int8, int4, bnb\.nf4, "),
        ({"mode": "int4", "group_size": 48}, "^group_size must be one of 32, 64, 128, got 48$"),
    ],
)
def test_wrong_settings_are_refused_before_anything_changes(kwargs, message):
    model = tiny_gpt()
    with pytest.raises(ValueError, match=message):
        quantize_model(model, **kwargs)
    assert model.quantization is None
    assert type(model.lm_head) is nn.Linear


@MODES
def test_a_quantised_model_is_not_quantised_again(mode):
    model = tiny_gpt_quantized(mode)
    with pytest.raises(ValueError, match="^the model is quantised already: int8 would round its weights once more$"):
        quantize_model(model, "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bitsandbytes_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="^quantize='bnb.nf4' needs a GPU"):
        quantize_model(tiny_gpt(), "bnb.nf4")


def test_bitsandbytes_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^quantize='bnb.nf4' needs the package bitsandbytes: pip install 'litgpt\[bnb\]'$"
    ):
        quantize_model(tiny_gpt(), "bnb.nf4")


# --- GPUs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@MODES
def test_on_a_gpu_a_model_gives_the_logits_of_the_cpu(mode):
    model, idx = tiny_gpt_quantized(mode), torch.randint(0, 100, (2, 40))
    expected = model(idx)
    model.to("cuda")
    assert model.lm_head.weight.is_cuda
    for T in (1, 40):
        torch.testing.assert_close(model(idx[:, :T].cuda()).cpu(), expected[:, :T], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", quantize.BNB_MODES)
def test_bitsandbytes_keeps_the_logits_about_as_they_are(mode):
    pytest.importorskip("bitsandbytes")
    model, idx = tiny_gpt(n_embd=128, intermediate_size=256).bfloat16(), torch.randint(0, 100, (2, 9))
    expected = model(idx).float()
    quantize_model(model, mode)
    model.to("cuda")
    logits = model(idx.cuda()).cpu().float()
    assert F.cosine_similarity(logits, expected, dim=-1).mean() > (0.95 if mode == "bnb.int8" else 0.6)
    assert type(model.transformer.h[0].attn.qkv).__module__.startswith("bitsandbytes.")
