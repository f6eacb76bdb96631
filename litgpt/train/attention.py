"""Attention of a layer that is trained, from what its norm is given to its projection, as one function: queries, keys and values
are rotated where the product has put them, and their gradients go into one matrix.

Letters: N tokens of all rows one after the other, H query heads, G key/value heads, D head size.
"""

from collections.abc import Sequence

import torch

from litgpt.attention import MultiHeadSelfAttention
from litgpt.kernels import training
from litgpt.kernels.library import training_library
from litgpt.kernels.matrices import product
from litgpt.kernels.row_attention import Seen, attention_of_rows, gradients_of_rows
from litgpt.model import CausalSelfAttention, Rows
from litgpt.rope import Rope, layer_rope
from litgpt.train.linear import Adds, Recomputable, are_alike, as_rows, shaped
from litgpt.train.room import Room


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        trained: torch.Tensor,
        layer: CausalSelfAttention,
        adds: Sequence[Adds],
        room: Room,
        rope: Rope | None,
        sizes: Sequence[int],
        of: Recomputable | None = None,
        n: int = 0,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        rows, (to_heads, proj) = as_rows(x), weights
        memory, (place, y_place) = room.take(rows, len(to_heads), proj.shape[1])
        qkv = product(rows, to_heads.T, to=place)
        q, k, v = _parts(layer, qkv)
        if rope is not None:
            rotated = _heads(layer, qkv)[:, : q.shape[1] + k.shape[1]]
            training.rotate_to(rotated, rotated, *rope, False)
        y, logs = attention_of_rows(q, k, v, sizes, layer.mha.scale, _seen(layer), y_place)
        ctx.layer, ctx.adds, ctx.rope, ctx.sizes = layer, adds, rope, sizes
        ctx.of, ctx.room, ctx.memory = of, room, memory
        ctx.save_for_backward(*weights, qkv, y, logs, *([x] if of is None else inputs[:n]))
        return shaped(product(as_rows(y), proj.T), x)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_heads, proj, qkv, y, logs, *kept = ctx.saved_tensors
        layer, rows = ctx.layer, as_rows(d_y)
        ctx.adds[1](rows.T, as_rows(y))
        d_heads, d_qkv = product(rows, proj), torch.empty_like(qkv)
        parts = _parts(layer, d_qkv)
        gradients_of_rows(*_parts(layer, qkv), y, d_heads, logs, ctx.sizes, layer.mha.scale, parts, _seen(layer))
        ctx.room.give(ctx.memory)
        if ctx.rope is not None:
            rotated = _heads(layer, d_qkv)[:, : parts[0].shape[1] + parts[1].shape[1]]
            training.rotate_to(rotated, rotated, *ctx.rope, True)
        x, gradients = (kept[0], None) if ctx.of is None else ctx.of.again(kept)
        ctx.adds[0](d_qkv.T, as_rows(x))
        d_x, none = shaped(product(d_qkv, to_heads), d_y), [None] * 9
        return (d_x, *none) if gradients is None else (None, *none, *gradients(d_x))


def attention(
    layer: CausalSelfAttention,
    adds: Sequence[Adds],
    room: Room,
    x: torch.Tensor,
    rope: list[Rope],
    plan: Rows | None = None,
    token_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """What an attention layer gives, in one function where there are kernels for it. `adds` have the products that are gradients
    of its two weights."""
    rope, plan = layer_rope(rope, plan)
    own_rope = None if layer.rope_kind is None else rope[layer.rope_kind]
    if not _has_kernels(layer, x, own_rope):
        return type(layer).forward(layer, x, rope, plan, token_idx)
    weights = layer.qkv.weight, layer.proj.weight
    sizes = [x.shape[1]] if plan is None else plan.sizes
    arguments = weights, weights[0], layer, adds, room, own_rope, sizes
    if not hasattr(x, "made_by"):
        return _Attention.apply(x, *arguments)
    of, inputs = x.made_by
    return _Attention.apply(x.detach(), *arguments, of, len(inputs), *inputs, *of.params)


def _has_kernels(layer: CausalSelfAttention, x: torch.Tensor, rope: Rope | None) -> bool:
    size, mha = layer.config.head_size, layer.mha
    return (
        torch.is_grad_enabled()
        and len(x) == 1
        and x.dtype in (torch.float32, torch.bfloat16)
        and size % 16 == 0
        and layer.qkv.bias is layer.proj.bias is layer.norm_q is layer.sinks is None
        and type(mha) is MultiHeadSelfAttention
        and mha.has_plain_scores()
        and are_alike(x, layer.qkv.weight, layer.proj.weight)
        and training_library() is not None
        and not (rope and layer.config.rope_interleave)
        and (rope is None or training.can_rotate_heads(size, x.dtype, *rope))
    )


def _seen(layer: CausalSelfAttention) -> Seen:
    return Seen.within(layer.config.window(layer.block_idx))


def _heads(layer: CausalSelfAttention, qkv: torch.Tensor) -> torch.Tensor:
    """(N, (H + 2 G) D) as (1, H + 2 G, N, D)."""
    return qkv.view(1, len(qkv), -1, layer.config.head_size).transpose(1, 2)


def _parts(layer: CausalSelfAttention, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in it."""
    H, G = layer.config.n_head, layer.config.n_query_groups
    return _heads(layer, qkv).split_with_sizes((H, G, G), dim=1)
