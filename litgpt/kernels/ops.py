"""The kernels as functions of tensors: bfloat16 on CPU, and not differentiable."""

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch

from litgpt.kernels import processor
from litgpt.kernels.library import encoded_library, float32_library, library
from litgpt.kernels.structs import Look, ScoredCache, Vectors

MAX_ROWS = 16  # for more, torch's products of a single layer are as fast or faster, where it has them in bfloat16
MAX_QUERIES = 16  # of one sequence
MAX_HEAD_SIZE = 256  # of `attend`, as in layers.h
ACTIVATIONS = {"silu": 0, "gelu-none": 1, "gelu-tanh": 2}  # of `gated_mlp_blocked`, as in numbers.h
TILE = 64  # outputs of a block in the layout of `blocked`, as in weights.h

_strides = struct.Struct("11q")


def available() -> bool:
    """Whether there are kernels on this machine."""
    return library() is not None


def are_vectorized() -> bool:
    """Whether there are kernels on this machine by instructions that make bfloat16 faster than float32."""
    return available() and processor.instruction_set().name in processor.VECTORIZED


# a constant of compiled graphs, as `torch.compiler.assume_constant_result` says it, which imports a second's worth of torch
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reads_codes() -> bool:
    """Whether there are kernels on this machine for keys and values that are encoded: `attend_encoded`, and `run_layers` with such
    caches."""
    return encoded_library() is not None


def is_faster(rows: int) -> bool:
    """Whether a single layer is faster by the kernels than by torch for that many rows."""
    return available() and (rows <= MAX_ROWS or not processor.torch_multiplies_bfloat16())


@functools.cache
def reads_packed_weights() -> bool:
    """Whether oneDNN lays weights out on this machine as `linear_blocked` reads them."""
    if library() is None or not processor.torch_multiplies_bfloat16():
        return False
    N, K = 70, 40
    weight = torch.arange(N * K).remainder(251).view(N, K).to(torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 128)
    expected = blocked(weight)
    size = 2 * expected.numel()
    if torch.ops.mkldnn._nbytes(packed) != size:
        return False
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), size) == ctypes.string_at(expected.data_ptr(), size)


def packed_inputs(K: int) -> int:
    """Inputs that the layout of `blocked` has for K of them."""
    return -(-K // 32) * 32


def blocked(weight: torch.Tensor) -> torch.Tensor:
    """A weight (N, K) as `linear_blocked` reads it, which is oneDNN's way too: blocks of TILE outputs, in them pairs of
    inputs, padded with zeros: (blocks, pairs, TILE, 2)."""
    N, K = weight.shape
    padded = weight
    if N % TILE or K != packed_inputs(K):
        padded = weight.new_zeros(-(-N // TILE) * TILE, packed_inputs(K))
        padded[:N, :K] = weight
    return padded.view(-1, TILE, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()


def unblocked(weight: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The weight (N, K) that `blocked` was given."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :K].contiguous()


def linear_blocked(x: torch.Tensor, weight: int, bias: torch.Tensor | None, N: int) -> torch.Tensor:
    """x (..., K) times the weight with N outputs that lies at the address `weight`, as `blocked` has it: (..., N)."""
    x = x.contiguous()
    K, y = x.shape[-1], x.new_empty(*x.shape[:-1], N)
    library().linear_blocked(x.data_ptr(), weight, _address(bias), y.data_ptr(), x.numel() // K, K, N)
    return y


def linear_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K) times weight (N, K): (..., N)."""
    x = x.contiguous()
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    library().linear_plain(x.data_ptr(), weight.data_ptr(), _address(bias), y.data_ptr(), x.numel() // K, K, N)
    return y


def linear_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (..., K) times a weight of integers (N, K) int8, whose row n counts `scale[n]` (float32): (..., N)."""
    x = x.contiguous()
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    library().linear_int8(x.data_ptr(), weight.data_ptr(), scale.data_ptr(), None, y.data_ptr(), x.numel() // K, K, N)
    return y


def linear_int4(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """x (..., K) times a weight of pairs of integers (N, K / 2) uint8, the even columns in the low halves: (..., N).

    `scale` and `minimum` (N, K / group) float16 say for groups of 32, 64 or 128 columns what 1 and 0 stand for.
    """
    x = x.contiguous()
    (N, groups), K = scale.shape, x.shape[-1]
    y = x.new_empty(*x.shape[:-1], N)
    library().linear_int4(
        *(x.data_ptr(), weight.data_ptr(), scale.data_ptr(), minimum.data_ptr(), None, y.data_ptr()),
        *(x.numel() // K, K, N, K // groups),
    )
    return y


def gated_mlp_blocked(x: torch.Tensor, first: int, second: int, inner: int, activation: int) -> torch.Tensor:
    """A gated MLP (..., E) to (..., E): `first` is the address of the gate's and then as many (`inner`, a multiple of TILE)
    other outputs, `second` that of the way back. `activation` is one of `ACTIVATIONS`."""
    x = x.contiguous()
    E, y = x.shape[-1], torch.empty_like(x)
    library().gated_mlp_blocked(x.data_ptr(), first, second, y.data_ptr(), x.numel() // E, E, inner, E, activation)
    return y


def can_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `rms_norm` is there for these. Compiled graphs rather merge the norm with what is around it."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
        and available()
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, times `weight + offset`."""
    x = x.contiguous()
    size, y = x.shape[-1], torch.empty_like(x)
    library().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps, offset)
    return y


def _wants_gradients(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def can_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether `attend` is there for these: a few queries, bfloat16 on CPU, no gradients."""
    return (
        query.dtype == torch.bfloat16
        and query.shape[2] <= MAX_QUERIES
        and query.device.type == "cpu"
        and available()
        and query.shape[-1] == values.shape[-1] <= MAX_HEAD_SIZE
        and not _wants_gradients(query, keys, values, sinks)
        and query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
        and (bias is None or (bias.dtype == torch.bfloat16 and bias.shape[1] == 1 and bias.stride(-1) == 1))
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """Attention (B, T, H, D) from query (B, H, T, D) over keys and values (B, G, N, D), with soft-capping if `cap` > 0.

    Args as for `litgpt.attention.MultiHeadSelfAttention.attend`; `bias` (B or 1, 1, T or 1, N).
    """
    B, H, T, D = query.shape
    G, N = keys.shape[1:3]
    y = query.new_empty(B, T, H, D)
    q, k, v = query.stride(), keys.stride(), values.stride()
    bias_strides = (0, 0)
    if bias is not None:
        b = bias.stride()
        bias_strides = (b[0] if bias.shape[0] > 1 else 0, b[2] if bias.shape[2] > 1 else 0)
    strides = _strides.pack(q[0], q[1], q[2], k[0], k[1], k[2], v[0], v[1], v[2], *bias_strides)
    library().attend(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        *(None, None, 0),
        _address(bias),
        _address(sinks),
        y.data_ptr(),
        *(B, H, G, T, N, D, strides, scale, cap),
    )
    return y


def can_attend_encoded(
    query: torch.Tensor, encoded: tuple[Vectors, ...], bias: torch.Tensor | None, sinks: torch.Tensor | None
) -> bool:
    """Whether `attend_encoded` is there for these: as `can_attend`, and codes that the kernels read."""
    return (
        all(side.kind for side in encoded)
        and len(encoded) == 2
        and not torch.compiler.is_compiling()
        and can_attend(query, query, query, bias, sinks)
        and reads_codes()
    )


def attend_encoded(
    query: torch.Tensor,
    encoded: tuple[Vectors, Vectors],
    n_query_groups: int,
    length: int,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    cap: float,
    newest: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """As `attend`, with keys and values of `n_query_groups` heads and `length` slots that are `encoded`, or `newest`: see
    `litgpt.keys_and_values.EncodedKeysAndValues`. Queries and outputs are not rotated."""
    B, H, T, D = query.shape
    y = query.new_empty(B, T, H, D)
    bias_strides = (0, 0)
    if bias is not None:
        b = bias.stride()
        bias_strides = (b[0] if bias.shape[0] > 1 else 0, b[2] if bias.shape[2] > 1 else 0)
    keys, values, sealed, own_strides = None, None, None, (0,) * 6
    if newest is not None:
        keys, values, n = newest
        sealed, own_strides = (ctypes.c_int64 * B)(*[n] * B), (*keys.stride()[:3], *values.stride()[:3])
    strides = _strides.pack(*query.stride()[:3], *own_strides, *bias_strides)
    library().attend(
        *(query.data_ptr(), _address(keys), _address(values), (Vectors * 2)(*encoded)),
        *(sealed, 0 if keys is None else keys.shape[2], _address(bias), _address(sinks), y.data_ptr()),
        *(B, H, n_query_groups, T, length, D, strides, scale, cap),
    )
    return y


@functools.cache
def multiplies_fast() -> bool:
    """Whether products of many rows are faster by the kernels than by torch on this machine."""
    return library() is not None and (bool(library().multiplies_fast()) or not processor.torch_multiplies_bfloat16())


def can_attend_causally(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None = None
) -> bool:
    """Whether `attend_causally` is there for these, on a machine where it is faster than torch's kernels."""
    return (
        query.dtype == keys.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[-1] == values.shape[-1] <= MAX_HEAD_SIZE
        and not _wants_gradients(query, keys, values, sinks)
        and query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
        and not torch.compiler.is_compiling()
        and multiplies_fast()
    )


def attend_causally(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    window: int | None,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """As `attend`, for queries that are the last T of N consecutive positions: each sees the last `window` keys (None: all)
    up to its own."""
    B, H, T, D = query.shape
    G, N = keys.shape[1:3]
    y = query.new_empty(B, T, H, D)
    strides = _strides.pack(*query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], 0, 0)
    library().attend_causally(
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr(), _address(sinks), y.data_ptr()),
        *(B, H, G, T, N, D, N if window is None else window, strides, scale, cap),
    )
    return y


def can_see_weights(query: torch.Tensor, keys: torch.Tensor | Vectors, sinks: torch.Tensor | None = None) -> bool:
    """Whether `see_weights` is there for these."""
    return (
        (keys.by_vector if isinstance(keys, Vectors) else keys.dtype == query.dtype and keys.stride(-1) == 1)
        and query.dtype == torch.bfloat16
        and (sinks is None or sinks.dtype == torch.bfloat16)
        and query.device.type == "cpu"
        and query.shape[-1] <= MAX_HEAD_SIZE
        and query.stride(-1) == 1
        and not torch.compiler.is_compiling()
        and available()
    )


def see_weights(
    query: torch.Tensor,
    keys: torch.Tensor | Vectors,
    length: int,
    ends: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    cap: float,
    largest: bool,
) -> torch.Tensor:
    """The attention weights of queries (B, H, n, D) on `length` keys (B, G, N, D), or encoded ones, summed over the queries and the
    heads that share keys, or the `largest` of them: (B, G, N), computed in float32.

    Args:
        ends: how many keys each query sees, the first ones (B, G, n), int64.
        sinks, scale, cap: as for `attend`.
    """
    B, H, n, D = query.shape
    G, ends = ends.shape[1], ends.contiguous()
    by_head, found = (torch.empty(B, heads, length, dtype=torch.float32) for heads in (H, G))
    coded = isinstance(keys, Vectors)
    strides = _strides.pack(*query.stride()[:3], *((0,) * 3 if coded else keys.stride()[:3]), *(0,) * 5)
    library().see_weights(
        *(query.data_ptr(), *((None, ctypes.byref(keys)) if coded else (keys.data_ptr(), None)), _address(sinks)),
        *(ends.data_ptr(), by_head.data_ptr(), found.data_ptr()),
        *(B, H, G, n, length, D, strides, scale, cap, largest),
    )
    return found


def can_move_slots(buffer: torch.Tensor) -> bool:
    """Whether `move_slots` is there for a buffer: on the CPU, and without a graph."""
    return (
        buffer.device.type == "cpu"
        and buffer.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and available()
    )


def move_slots(buffer: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Slot j of row `rows[b]` (None: b) and head g of a buffer (rows, G, slots, ...) becomes what its slot `index[b, g, j]` was."""
    index = index.contiguous()
    B, G, n = index.shape
    slots, bytes_of_slot = buffer.shape[2], buffer.element_size() * buffer.shape[3:].numel()
    library().move_slots(buffer.data_ptr(), _address(rows), index.data_ptr(), B, G, slots, n, bytes_of_slot)


def scoring_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for policies that score tokens by attention weights, for keys and queries of that type."""
    return {torch.bfloat16: library, torch.float32: float32_library}.get(dtype, lambda: None)()


def can_run_tails(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, longest: int
) -> bool:
    """Whether `run_tails` is there for these, with steps of at most `longest` tokens."""
    return (
        all(x is None or x.dtype == query.dtype for x in (key, value, sinks))
        and value.shape[-1] == query.shape[-1] <= MAX_HEAD_SIZE
        and all(x.device.type == "cpu" and x.stride(-1) == 1 for x in (query, key, value))
        and not torch.compiler.is_compiling()
        and not _wants_gradients(query, key, value, sinks)
        and scoring_library(query.dtype) is not None
        and (query.dtype == torch.float32 or longest <= MAX_QUERIES or multiplies_fast())
    )


def run_tails(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: ScoredCache,
    rows: torch.Tensor | None,
    places: tuple[torch.Tensor, torch.Tensor],
    steps: torch.Tensor,
    log: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention (B, T, H, D) of tokens, query (B, H, T, D), key and value (B, G, T, D), that enter a cache in steps, before which
    tokens are scored by attention weights, and some leave.

    Args:
        rows: of the cache (None: the first ones).
        places, steps: see `litgpt.kvcache.tails`.
        log: gets the positions in all slots as the tokens of every step find them (S, B, G, C) int32.
    """
    B, H, T, D = query.shape
    y = query.new_empty(B, T, H, D)
    scoring_library(query.dtype).run_tails(
        ctypes.byref(cache),
        struct.pack("3q", B, T, len(steps)),
        *map(_address, (query, key, value)),
        struct.pack("9q", *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        *map(_address, (rows, *places, steps, y, log)),
    )
    return y


def can_look(keys: torch.Tensor) -> bool:
    """Whether `run_looks` is there for caches with these keys, encoded or not."""
    return (
        keys.device.type == "cpu"
        and keys.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and available()
    )


def run_looks(looks: Sequence[Look], dtype: torch.dtype) -> None:
    """Let policies look at what caches of that type hold, all at once."""
    scoring_library(dtype).run_looks((Look * len(looks))(*looks), len(looks))


def can_choose_slots(scores: torch.Tensor) -> bool:
    """Whether `choose_slots` is there for these."""
    return scores.device.type == "cpu" and not torch.compiler.is_compiling() and available()


def choose_slots(scores: torch.Tensor, n_sink: int, recent: int, kept: int) -> torch.Tensor:
    """Slots of the `kept` best of scores (..., N) float32, ascending, the first `n_sink` and newest `recent` among them: see
    `litgpt.kvcache.policies.score.ScorePolicy.best`."""
    scores = scores.contiguous()
    N, index = scores.shape[-1], scores.new_empty((*scores.shape[:-1], kept), dtype=torch.int64)
    library().choose_slots(scores.data_ptr(), index.data_ptr(), scores.numel() // N, N, n_sink, recent, kept)
    return index


def can_find_likeliest(logits: torch.Tensor) -> bool:
    """Whether `likeliest` is there for these."""
    return logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and available()


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row of logits (B, N), the first of equally likely ones, (B,) int64; -1 where logits are NaN or inf,
    or all are -inf."""
    logits = logits.contiguous()
    B, N = logits.shape
    tokens = logits.new_empty(B, dtype=torch.int64)
    library().find_likeliest(logits.data_ptr(), tokens.data_ptr(), B, N)
    return tokens


# Compiled graphs call it as an operator, since they cannot look into it.
_library = torch.library.Library("litgpt", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor? bias, Tensor? sinks, float scale, float cap) -> Tensor"
)
_library.impl("attend", attend, "CPU")
torch.library.register_fake(
    "litgpt::attend",
    lambda query, *_: query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]),
    lib=_library,
)


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
