"""Attention as pure functions of tensors, against explicit softmax over the keys that a query sees."""

import itertools
import math

import pytest
import torch
from kvcache.reference import softmax_attention, visible
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt import attention, masks
from litgpt.attention import MultiHeadSelfAttention, do_softcapping, scaled_dot_product_attention
from litgpt.config import Config
from litgpt.keys_and_values import DefaultKeysAndValues

D = 8
heads = pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1)])


def explicit(query, keys, values, seen, scale, softcap=None):
    """Outputs (B, H, T, D) and weights summed over queries (B, H, N), where query (b, t) sees keys `seen[b][t]`."""
    B, H, T, _ = query.shape
    output = torch.empty(B, H, T, values.shape[-1], dtype=torch.float64)
    summed = torch.zeros(B, H, keys.shape[2], dtype=torch.float64)
    for b, t in itertools.product(range(B), range(T)):
        at = seen[b][t]
        output[b, :, t], weights = softmax_attention(query[b, :, t], keys[b][:, at], values[b][:, at], scale, softcap)
        summed[b, :, at] += weights
    return output, summed


def qkv(H, G, T, N, B=2, dtype=torch.float32):
    return tuple(2 * torch.randn(B, n, length, D, dtype=dtype) for n, length in ((H, T), (G, N), (G, N)))


def config(H=4, G=2, **kwargs):
    return Config(n_layer=2, n_embd=H * D, n_head=H, n_query_groups=G, block_size=4096, **kwargs)


def close(x, expected, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(x.double(), expected, atol=tolerance, rtol=0)


class SharedBuffer(DefaultKeysAndValues):
    """A storage that decodes keys and values into one buffer: those asked for first are gone with the second."""

    def __init__(self, keys, values):
        super().__init__(keys, values)
        self.buffer = torch.empty_like(keys)

    def keys(self):
        return self.buffer.copy_(super().keys())

    def values(self):
        return self.buffer.copy_(super().values())

    def both_in_parallel(self):
        return False


class Largest(TorchDispatchMode):
    """Size of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_keys_and_values_have_to_agree():
    keys, values = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 6)
    both = DefaultKeysAndValues(keys, values)
    assert (both.keys() is keys, both.values() is values, both.both_in_parallel()) == (True, True, True)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\) and \(1, 2, 2, 4\)"):
        DefaultKeysAndValues(keys, keys[:, :, :2])
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        DefaultKeysAndValues(keys[0], keys[0])


def test_softcapping_bounds_scores_and_keeps_small_ones():
    x = torch.linspace(-100, 100, 201, dtype=torch.float64)
    expected = [5 * (math.exp(2 * v / 5) - 1) / (math.exp(2 * v / 5) + 1) for v in x.tolist()]
    torch.testing.assert_close(do_softcapping(x, 5.0), torch.tensor(expected, dtype=torch.float64))
    assert do_softcapping(x, None) is x


@heads
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared-buffer"])
@pytest.mark.parametrize("mode", ["causal", "bias", "row-bias", "none"])
def test_attend_is_softmax_attention_by_every_way(H, G, softcap, dtype, shared, mode, monkeypatch):
    T, N = (7, 7) if mode == "causal" else (5, 9)
    query, keys, values = qkv(H, G, T, N, dtype=dtype)
    visibility = torch.rand(2, 1, 1 if mode == "row-bias" else T, N) < 0.5
    visibility[..., 0] = True
    bias = torch.zeros(visibility.shape, dtype=dtype).masked_fill(~visibility, -math.inf)
    if mode == "causal":
        seen = [[list(range(t + 1)) for t in range(T)]] * 2
    elif mode == "none":
        seen = [[list(range(N))] * T] * 2
    else:
        seen = [[row.nonzero().flatten().tolist() for row in part[0].expand(T, N)] for part in visibility]
    expected, summed = explicit(query, keys, values, seen, 0.3, softcap)
    kv = (SharedBuffer if shared else DefaultKeysAndValues)(keys, values)
    for block, eager, return_weights in [
        (None, False, False),
        (None, True, False),
        (None, False, True),
        (1, True, True),
    ]:
        if block:  # a few queries at a time
            monkeypatch.setattr(attention, "SCORE_BLOCK_BYTES", 4 * 2 * H * N * 2)
        mha = MultiHeadSelfAttention(Config(n_head=H, n_query_groups=G), use_eager_sdpa_always=eager)
        mha.scale, mha.softcapping = 0.3, softcap
        own_bias = bias if mode in ("bias", "row-bias") else None
        output, weights = mha.attend(query, kv, own_bias, mode == "causal", return_weights)
        assert output.dtype == dtype
        close(output, expected, dtype)
        assert (weights is not None) == return_weights
        if return_weights:
            assert weights.dtype == torch.float32
            close(weights, summed, dtype)


@heads
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scaled_dot_product_attention_returns_every_weight(H, G, softcap):
    T, N = 4, 6
    query, keys, values = qkv(H, G, T, N)
    visibility = torch.rand(2, H, T, N) < 0.6
    visibility[..., 2] = True
    for mask in (None, visibility, torch.where(visibility, 0.0, -math.inf)):
        output, weights = scaled_dot_product_attention(
            query, DefaultKeysAndValues(keys, values), 0.5, mask, attention_logit_softcapping=softcap
        )
        assert weights.shape == (2, H, T, N)
        for b, h, t in itertools.product(range(2), range(H), range(T)):
            at = torch.arange(N) if mask is None else visibility[b, h, t].nonzero().flatten()
            group = h // (H // G)
            expected, shares = softmax_attention(
                query[b, h : h + 1, t], keys[b, group, at][None], values[b, group, at][None], 0.5, softcap
            )
            close(output[b, h, t], expected[0])
            close(weights[b, h, t, at], shares[0])
            assert weights[b, h, t].count_nonzero() == len(at)


@heads
@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block_idx", [0, 1])
def test_self_attention_of_a_layer(H, G, window, softcap, block_idx, monkeypatch):
    """In one piece, after earlier tokens, and over keys in any order: outputs, and weights that sum up to the queries."""
    cfg = config(
        H,
        G,
        sliding_window_size=window,
        sliding_window_indices=None if window is None else [0, 1],
        attention_logit_softcapping=softcap,
        attention_scores_scalar=5,
    )
    in_layer = window if block_idx else None
    scale = 1 / math.sqrt(5)
    for query_block, (first, T) in itertools.product((512, 3), [(None, 10), (0, 10), (12, 1), (9, 8)]):
        monkeypatch.setattr(masks, "QUERY_BLOCK", query_block)
        N = (first or 0) + T
        query, keys, values = qkv(H, G, T, N)
        seen = [[visible(N - T + t, window=in_layer) for t in range(T)]] * 2
        expected, summed = explicit(query, keys, values, seen, scale, softcap)
        order = torch.stack([torch.randperm(N + 2) for _ in range(2 * G)]).view(2, G, N + 2)
        positions = torch.where(order < N, order, -1)  # two slots are empty
        index = order[..., None].expand(-1, -1, -1, D)
        padded = [torch.cat((x, torch.randn(2, G, 2, D)), 2).gather(2, index) for x in (keys, values)]
        for eager, return_weights in [(False, False), (False, True), (True, False)]:
            mha = MultiHeadSelfAttention(cfg, use_eager_sdpa_always=eager)
            for kv in (DefaultKeysAndValues(keys, values), SharedBuffer(keys, values)):
                output, weights = mha(query, kv, block_idx, first, return_weights)
                assert output.shape == (2, T, H * D)
                close(output, expected.transpose(1, 2).flatten(2))
                assert (weights is not None) == return_weights
                if return_weights:
                    close(weights, summed)
            output, weights = mha(query, DefaultKeysAndValues(*padded), block_idx, first, return_weights, positions)
            close(output, expected.transpose(1, 2).flatten(2))
            if return_weights:
                slots = positions.clamp(min=0).repeat_interleave(H // G, 1)
                close(weights, summed.gather(2, slots).masked_fill(positions.repeat_interleave(H // G, 1) < 0, 0))


def test_weights_of_all_queries_add_up_to_their_number():
    query, keys, values = qkv(4, 2, 20, 20)
    _, weights = MultiHeadSelfAttention(config())(
        query, DefaultKeysAndValues(keys, values), 0, return_attn_weights=True
    )
    close(weights.sum(-1), torch.full((2, 4), 20.0, dtype=torch.float64))


def test_kernels_that_are_allowed_are_those_used():
    query, keys, values = qkv(4, 2, 6, 6)
    kv = DefaultKeysAndValues(keys, values)
    expected, _ = MultiHeadSelfAttention(config())(query, kv, 0)
    for kernels in (SDPBackend.MATH, [SDPBackend.MATH]):
        output, _ = MultiHeadSelfAttention(config(), sdpa_kernels=kernels)(query, kv, 0)
        close(output, expected.double())
    with pytest.raises(RuntimeError):
        MultiHeadSelfAttention(config(), sdpa_kernels=SDPBackend.CUDNN_ATTENTION)(query, kv, 0)
    short = DefaultKeysAndValues(keys.bfloat16(), values.bfloat16())  # for which there are kernels of our own
    with pytest.raises(RuntimeError):
        MultiHeadSelfAttention(config(), sdpa_kernels=SDPBackend.CUDNN_ATTENTION)(query.bfloat16(), short, 0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("T", "N", "window"), [(3000, 3000, 100), (3000, 3000, None), (2000, 4000, None), (3000, 4000, 100)]
)
def test_no_tensor_of_a_long_call_has_queries_times_keys(T, N, window, softcap, monkeypatch):
    monkeypatch.setattr(attention, "SCORE_BLOCK_BYTES", 4 * 512 * N)
    cfg = config(1, 1, sliding_window_size=window, attention_logit_softcapping=softcap)
    query, keys, values = qkv(1, 1, T, N, B=1)
    positions = torch.arange(N)[None, None]
    for token_positions, bound in ((None, N if window is None else 512 + window), (positions, N)):
        with Largest() as largest:
            MultiHeadSelfAttention(cfg)(query, DefaultKeysAndValues(keys, values), 0, N - T, False, token_positions)
        assert largest.numel <= max(512 * bound, keys.numel())


def test_shapes_and_positions_that_do_not_fit_are_refused():
    mha = MultiHeadSelfAttention(config(4, 2))
    query, keys, values = qkv(4, 2, 3, 8)
    kv = DefaultKeysAndValues(keys, values)
    for input_pos in (None, 0, 4):
        with pytest.raises(ValueError, match=f"8 keys .*expected {(input_pos or 0) + 3} "):
            mha(query, kv, 0, input_pos)
    with pytest.raises(ValueError, match=r"\(2, 2, 8\).*\(2, 8\)"):
        mha(query, kv, 0, 5, token_positions=torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 query heads.* 2 "):
        mha(query[:, :3], kv, 0, 5)
