"""Causal attention of rows that lie one after the other, on CPU, with gradients: sums in float32."""

import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from litgpt.kernels.library import training_library


def can_attend_rows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, differentiated: bool = True) -> bool:
    """Whether `attend_rows` is there for these: one batch row, float32 or bfloat16 on CPU, and gradients are wanted if they have to
    be `differentiated`."""
    inputs = (query, keys, values)
    return (
        (not differentiated or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)))
        and query.dtype in (torch.float32, torch.bfloat16)
        and all(x.dtype == query.dtype and x.device.type == "cpu" and x.stride(-1) == 1 for x in inputs)
        and query.shape[0] == 1
        and query.shape[-1] == values.shape[-1]
        and query.shape[-1] % 16 == 0
        and not torch.compiler.is_compiling()
        and training_library() is not None
    )


class Seen(NamedTuple):
    """Which keys a query sees: of those up to its own the last `window`, and the first `n_sink`."""

    window: int = 1 << 40
    n_sink: int = 0

    @classmethod
    def within(cls, window: int | None) -> "Seen":
        """The last `window` (None: all)."""
        return cls() if window is None else cls(window)


ALL = Seen()


def attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sizes: Sequence[int],
    scale: float,
    seen: Seen = ALL,
    mask: torch.Tensor | None = None,
    attended: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention (1, T, H * D) of queries (1, H, T, D) over keys and values (1, G, N, D): rows of these sizes, in each of which a
    token sees those up to itself. A single row may have more keys: those of tokens before it; and in float32 a `mask`
    (1 or G, T, N), False where a token does not see a key. What `attention_of_rows` has given for the same is taken from `attended`."""
    if mask is not None and query.dtype != torch.float32:
        raise ValueError(f"attention of rows has masks in float32 only, not in {query.dtype}")
    return _RowAttention.apply(query, keys, values, tuple(sizes), scale, seen, mask, attended)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sizes: tuple[int, ...],
        scale: float,
        seen: Seen,
        mask: torch.Tensor | None,
        attended: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        values = values.contiguous()  # a view would keep queries and keys without RoPE for the backward pass
        mask = None if mask is None else mask.contiguous()
        y, logs = attended or attention_of_rows(query, keys, values, sizes, scale, seen, mask=mask)
        ctx.save_for_backward(query, keys, values, y, logs, mask)
        ctx.sizes, ctx.scale, ctx.seen = sizes, scale, seen
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, y, logs, mask = ctx.saved_tensors
        found = [
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, keys, values)
        ]
        found = [x.transpose(1, 2) for x in found]
        gradients_of_rows(query, keys, values, y, d_y.contiguous(), logs, ctx.sizes, ctx.scale, found, ctx.seen, mask)
        return *found, *[None] * 5


def attention_of_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sizes: Sequence[int],
    scale: float,
    seen: Seen = ALL,
    y: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_rows` without autograd, perhaps in the memory of `y`, and what its gradients need (H, T)."""
    _, H, T, D = query.shape
    y, logs = query.new_empty(1, T, H * D) if y is None else y, query.new_empty(H, T, dtype=torch.float32)
    numbers = _sizes(query, keys, values, sizes, scale, seen, mask)
    training_library().attend_rows(*_addresses(query, keys, values, y, logs), *numbers)
    return y, logs


def gradients_of_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    y: torch.Tensor,
    d_y: torch.Tensor,
    logs: torch.Tensor,
    sizes: Sequence[int],
    scale: float,
    to: Sequence[torch.Tensor],
    seen: Seen = ALL,
    mask: torch.Tensor | None = None,
) -> None:
    """The gradients of queries, keys and values, which are put into `to`; heads of a token lie there one after the other, and
    those of keys as those of values."""
    H, G, N, D = query.shape[1], *keys.shape[1:]
    parts = query.new_empty(2, N, H, D, dtype=torch.float32) if G < H else None
    training_library().attend_rows_backward(
        *_addresses(query, keys, values, y, d_y, logs, to[0], parts, to[1], to[2]),
        *_sizes(query, keys, values, sizes, scale, seen, mask, to),
    )


def _addresses(*tensors: torch.Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def _sizes(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sizes: Sequence[int],
    scale: float,
    seen: Seen,
    mask: torch.Tensor | None,
    to: Sequence[torch.Tensor] = (),
) -> tuple:
    """H, G, D, the number of rows, their ends, strides over tokens and heads, what queries see, the scale, and whether numbers are
    bfloat16."""
    strides = [x.stride(dim) for x in (query, keys, values) for dim in (2, 1)] + [x.stride(2) for x in to[:2]]
    ends = struct.pack(f"{len(sizes)}q", *accumulate(sizes))
    shape = query.shape[1], keys.shape[1], query.shape[3], len(sizes)
    address, stride = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0)
    what = struct.pack("5q", keys.shape[2] - query.shape[2], *seen, address, stride)
    return *shape, ends, struct.pack(f"{len(strides)}q", *strides), what, scale, query.dtype == torch.bfloat16
