"""Kernels against the same sums in float64."""

import itertools
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.attention import scaled_dot_product_attention
from litgpt.kernels import ops, processor
from litgpt.keys_and_values import DefaultKeysAndValues, EncodedKeysAndValues
from litgpt.kvcache.storages.codecs import Int4, Int5, Int8
from litgpt.masks import position_bias
from litgpt.runners.quantized_weights import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

INSTRUCTION_SET = getattr(processor.instruction_set(), "name", "none")

pytestmark = pytest.mark.skipif(not ops.available(), reason="no kernels on this machine")

SHAPES = [(1, 64, 64), (1, 40, 70), (3, 576, 130), (5, 96, 33), (6, 70, 64), (7, 160, 100), (16, 1536, 576)]


def rows(*shape):
    return torch.randn(*shape).to(torch.bfloat16)


def assert_rounded(found, expected, of_largest=2**-14):
    """`found` is `expected`, computed in float32 and rounded to bfloat16."""
    assert found.dtype == torch.bfloat16
    error = (found.double() - expected).abs()
    assert (error <= expected.abs() * 2**-8 + expected.abs().max() * of_largest).all()


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_plain_weights(M, K, N, biased):
    x, weight, bias = rows(M, K), rows(N, K), rows(N) if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_rounded(ops.linear_plain(x, weight, bias), expected)
    blocked = ops.blocked(weight)
    assert torch.equal(ops.unblocked(blocked, N, K), weight)
    assert_rounded(ops.linear_blocked(x, blocked.data_ptr(), bias, N), expected)


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_integer_weights(M, K, N):
    x, weight = rows(M, K), torch.randn(N, K)
    integers, scale = quantize_int8(weight)
    assert_rounded(ops.linear_int8(x, integers, scale), x.double() @ dequantize_int8(integers, scale, torch.float64).T)
    for group in (32, 64, 128):
        if K % group == 0:
            form = quantize_int4(weight, group)
            assert_rounded(ops.linear_int4(x, *form), x.double() @ dequantize_int4(*form, torch.float64).T)


@pytest.mark.parametrize("M", [2, 5, 9, 16])
@pytest.mark.parametrize("kind", ["blocked", "plain", "int8", "int4"])
def test_a_row_does_not_depend_on_those_beside_it(M, kind):
    x, weight = rows(M, 576), rows(200, 576)
    if kind == "blocked":
        packed = ops.blocked(weight)
        product = partial(ops.linear_blocked, weight=packed.data_ptr(), bias=None, N=200)
    else:
        form = {"plain": (weight,), "int8": quantize_int8(weight), "int4": quantize_int4(weight)}[kind]
        product = lambda x: getattr(ops, f"linear_{kind}")(x, *form)  # noqa: E731
    assert torch.equal(product(x), torch.cat([product(row) for row in x.split(1)]))


@pytest.mark.parametrize("K", [64, 9000])
def test_one_large_number_in_a_row_hides_no_others(K):
    x, weight = rows(1, K) / 10, torch.randn(32, K)
    x[0, 0], weight[:, 0] = 1e4, 0
    integers, scale = quantize_int8(weight)
    assert_rounded(ops.linear_int8(x, integers, scale), x.double() @ dequantize_int8(integers, scale, torch.float64).T)


def test_what_is_no_number_stays_so_in_its_own_row():
    x, weight = rows(3, 64), torch.randn(32, 64)
    x[1, 5] = torch.nan
    for y in (ops.linear_int8(x, *quantize_int8(weight)), ops.linear_int4(x, *quantize_int4(weight))):
        assert y.isnan().all(dim=1).tolist() == [False, True, False]
    query, keys, values = rows(2, 4, 1, 64), rows(2, 2, 70, 64), rows(2, 2, 70, 64)
    keys[1, 0, 3, 7] = torch.nan
    expected = torch.tensor([[[False] * 4], [[True, True, False, False]]])
    for sinks in (None, rows(4)):
        found = [ops.attend(query, keys, values, None, sinks, 0.1, 0.0)]
        if ops.can_attend_causally(query, keys, values):
            found.append(ops.attend_causally(query, keys, values, sinks, None, 0.1, 0.0))
        for y in found:
            assert torch.equal(y.isnan().all(dim=3), expected)
            assert torch.equal(y.isnan().any(dim=3), expected)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", F.silu),
        ("gelu-none", F.gelu),
        ("gelu-tanh", lambda x: F.gelu(x, approximate="tanh")),
    ],
)
@pytest.mark.parametrize("M", [1, 7])
def test_gated_mlp(name, function, M):
    x, gate, up, down = rows(M, 96), rows(128, 96) / 4, rows(128, 96), rows(96, 128)
    first, second = ops.blocked(torch.cat((gate, up))), ops.blocked(down)
    found = ops.gated_mlp_blocked(x, first.data_ptr(), second.data_ptr(), 128, ops.ACTIVATIONS[name])
    inner = function(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    expected = inner @ down.double().T
    assert (found.double() - expected).abs().max() < 2**-7 * expected.abs().max()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 100])
def test_rms_norm(offset, count):
    x, weight = rows(count, 3, 70), rows(70)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
    assert_rounded(ops.rms_norm(x, weight, 1e-5, offset), expected)


@pytest.mark.parametrize(
    ("B", "H", "G", "D"), [(1, 9, 3, 64), (2, 4, 1, 128), (3, 2, 2, 96), (1, 5, 5, 256), (2, 8, 1, 16)]
)
@pytest.mark.parametrize(("T", "N"), [(1, 1), (1, 63), (1, 200), (4, 77), (16, 1000)])
def test_attention(B, H, G, D, T, N):
    for masked, cap, with_sinks in itertools.product((False, True), (0.0, 5.0), (False, True)):
        keys, values = (rows(B, G, N + 3, D)[:, :, :N] for _ in range(2))  # parts of larger buffers
        query = rows(B, T, H, D).transpose(1, 2)
        bias = torch.zeros(B, 1, T, N, dtype=torch.bfloat16)
        if masked:
            hidden = torch.rand(B, 1, T, N) < 0.4
            hidden[..., 0] = False
            bias.masked_fill_(hidden, -torch.inf)
        sinks = rows(H) if with_sinks else None
        assert ops.can_attend(query, keys, values, bias)
        found = ops.attend(query, keys, values, bias if masked else None, sinks, D**-0.5, cap)
        expected, _ = scaled_dot_product_attention(
            query.float(),
            DefaultKeysAndValues(keys.float(), values.float()),
            D**-0.5,
            bias.float(),
            cap or None,
            None if sinks is None else sinks.float(),
        )
        assert (found.transpose(1, 2).float() - expected).abs().max() < 0.01


def test_what_attention_is_not_for():
    query, keys = rows(1, 2, 1, 16), rows(1, 1, 5, 16)
    assert ops.can_attend(query, keys, keys, None)
    assert not ops.can_attend(query.float(), keys.float(), keys.float(), None)
    assert not ops.can_attend(query, keys, keys[..., :8], None)
    assert not ops.can_attend(query, keys, keys.clone().requires_grad_(), None)
    assert not ops.can_attend(query, keys, keys, None, rows(2).requires_grad_())
    assert not ops.can_attend_causally(query, keys, keys.clone().requires_grad_())
    assert not ops.can_attend_causally(query, keys, keys, rows(2).requires_grad_())
    assert not ops.can_attend(query.requires_grad_(), keys, keys, None)
    assert not ops.can_attend(rows(1, 2, ops.MAX_QUERIES + 1, 16), keys, keys, None)
    assert not ops.can_attend(rows(1, 2, 1, 512), rows(1, 1, 5, 512), rows(1, 1, 5, 512), None)
    assert not ops.can_attend(rows(1, 2, 1, 16), keys, keys, torch.zeros(1, 2, 1, 5, dtype=torch.bfloat16))


@pytest.mark.skipif("avx512" not in INSTRUCTION_SET, reason=f"not promised with {INSTRUCTION_SET}")
@pytest.mark.parametrize(("H", "G", "D"), [(9, 3, 64), (8, 8, 128), (8, 2, 64), (4, 1, 128)])
def test_a_querys_output_is_the_same_to_the_last_bit_however_many_queries_a_call_brings(H, G, D):
    """What speculation needs: guesses that are checked together stand as if tokens came one by one."""
    keys, values = torch.randn(2, 1, G, 216, D).bfloat16()
    queries = torch.randn(1, H, 16, D).bfloat16()

    def attend(start, first, count):
        """Queries `first`, ..., that stand at `start + first`, ... and see all keys until then."""
        stop = start + first + count
        positions = torch.arange(start + first, stop)
        bias = None if count == 1 else position_bias(positions, torch.arange(stop), torch.bfloat16)[None, None]
        query = queries[:, :, first : first + count].contiguous()
        return ops.attend(query, keys[:, :, :stop], values[:, :, :stop], bias, None, 0.1, 0.0)

    for start in (100, 112, 120, 126, 127, 128, 129, 150, 200):
        one_by_one = torch.cat([attend(start, t, 1) for t in range(16)], dim=1)
        for count in range(2, 17):
            assert torch.equal(attend(start, 0, count), one_by_one[:, :count]), (start, count)


needs_fast_products = pytest.mark.skipif(not ops.can_attend_causally(*[rows(1, 1, 1, 16)] * 3), reason="no such kernel")


@needs_fast_products
@pytest.mark.parametrize(
    ("B", "H", "G", "D"), [(1, 9, 3, 64), (2, 4, 1, 128), (1, 2, 2, 96), (1, 3, 3, 256), (1, 8, 1, 16), (1, 4, 2, 80)]
)
@pytest.mark.parametrize(("T", "N"), [(1, 1), (7, 7), (40, 40), (17, 300), (200, 1100), (700, 700)])
def test_attention_of_many_queries(B, H, G, D, T, N):
    for window, cap, with_sinks in itertools.product((None, 30, 600), (0.0, 5.0), (False, True)):
        keys, values = (rows(B, G, N + 3, D)[:, :, :N] for _ in range(2))
        query = rows(B, T, H, D).transpose(1, 2)
        sinks = rows(H) if with_sinks else None
        found = ops.attend_causally(query, keys, values, sinks, window, D**-0.5, cap)
        expected, _ = scaled_dot_product_attention(
            query.float(),
            DefaultKeysAndValues(keys.float(), values.float()),
            D**-0.5,
            position_bias(torch.arange(N - T, N), torch.arange(N), torch.float32, window=window),
            cap or None,
            None if sinks is None else sinks.float(),
        )
        assert (found.transpose(1, 2).float() - expected).abs().max() < 0.02
        assert (found.transpose(1, 2).float() - expected).abs().mean() < 0.0015


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "G", "D", "n", "N", "cap", "sunk"),
    [(1, 9, 3, 64, 32, 200, 0.0, False), (2, 4, 2, 24, 70, 70, 3.0, True), (2, 5, 1, 80, 1, 33, 0.0, True)],
)
def test_weights_that_queries_give_are_float32(B, H, G, D, n, N, cap, sunk, largest):
    query, keys = (
        torch.randn(B, H, n, D, dtype=torch.bfloat16),
        torch.randn(B, G, N + 3, D, dtype=torch.bfloat16)[:, :, 2:-1],
    )
    sinks = torch.randn(H, dtype=torch.bfloat16) if sunk else None
    ends = torch.randint(1, N + 1, (B, G, n))
    scores = query.double() @ keys.double().repeat_interleave(H // G, 1).mT * 0.2
    scores = torch.tanh(scores / cap) * cap if cap else scores
    scores.masked_fill_(torch.arange(N) >= ends.repeat_interleave(H // G, 1)[..., None], -torch.inf)
    extra = (
        scores.new_full((B, H, n, 1), -torch.inf) if sinks is None else sinks.double()[:, None, None].expand(B, H, n, 1)
    )
    weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1].view(B, G, -1, N)
    assert ops.can_see_weights(query, keys, sinks)
    found = ops.see_weights(query, keys, N, ends, sinks, 0.2, cap, largest)
    torch.testing.assert_close(found.double(), weights.amax(2) if largest else weights.sum(2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("codec", [Int8(64), Int5(64, rotated=True), Int4(24, rotated=True), Int4(96)])
def test_weights_on_encoded_keys_are_those_on_decoded_ones(codec):
    query, keys = rows(2, 6, 9, codec.size), rows(3, 2, 50, codec.size)
    parts = [x[1:, :, 3:43] for x in codec.encode(keys)]
    stored = EncodedKeysAndValues([codec], tuple(parts), keys.dtype, codec.size)
    ends = torch.randint(1, 41, (2, 2, 9))
    (codes,), factors = stored.for_kernels(), (codec.size**-0.5, 0.0)
    assert ops.can_see_weights(query, codes)
    found = ops.see_weights(query, codes, 40, ends, None, *factors, largest=False)
    expected = ops.see_weights(query, stored.keys(), 40, ends, None, *factors, largest=False)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(found.sum(-1), expected.sum(-1))


EXAMPLES = int(os.environ.get("LITGPT_TEST_EXAMPLES", "15"))  # 1000 for a thorough run
thorough = settings(max_examples=EXAMPLES)


@thorough
@given(
    M=st.integers(1, 16),
    K=st.integers(1, 300) | st.integers(1, 12).map(lambda k: 32 * k),
    N=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_any_shape(M, K, N, seed):
    torch.manual_seed(seed)
    x, weight, bias = rows(M, K), rows(N, K), rows(N)
    expected = F.linear(x.double(), weight.double(), bias.double())
    blocked = ops.blocked(weight)
    assert_rounded(ops.linear_plain(x, weight, bias), expected)
    assert_rounded(ops.linear_blocked(x, blocked.data_ptr(), bias, N), expected)
    integers, scale = quantize_int8(weight.float())
    assert_rounded(ops.linear_int8(x, integers, scale), x.double() @ dequantize_int8(integers, scale, torch.float64).T)
    for group in (size for size in (128, 64, 32) if K % size == 0):
        form = quantize_int4(weight.float(), group)
        expected = x.double() @ dequantize_int4(*form, torch.float64).T
        assert_rounded(ops.linear_int4(x, *form), expected, of_largest=2**-13)  # with AVX2 rows are in 16 bits


@thorough
@given(
    *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 256)),
    *(st.integers(1, 16), st.integers(1, 200), st.integers(0, 2**32 - 1)),
)
def test_attention_of_any_shape(B, G, share, D, T, N, seed):
    torch.manual_seed(seed)
    query, keys, values = rows(B, G * share, T, D), rows(B, G, N, D), rows(B, G, N, D)
    found = ops.attend(query, keys, values, None, None, D**-0.5, 0.0)
    repeated = [x.double().repeat_interleave(share, 1) for x in (keys, values)]
    expected = F.scaled_dot_product_attention(query.double(), *repeated)
    torch.testing.assert_close(found.transpose(1, 2).double(), expected, atol=0.01, rtol=0.01)
