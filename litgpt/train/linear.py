"""Linear layers of a model that is trained: products by the library that is fast on this processor, and functions before
them that are computed again in the backward pass rather than kept: a norm or a gated product takes little time, and its result
is as large as what it is computed from.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.kernels import training
from litgpt.kernels.matrices import add_product, product
from litgpt.lora import LoRALinear
from litgpt.model import LLaMAMLP
from litgpt.train.room import Room

Adds = Callable[[torch.Tensor, torch.Tensor], None]  # adds the product of two matrices to a gradient


class Recomputable(NamedTuple):
    """A function of tensors, row by row, whose result is computed again in the backward pass rather than kept for it."""

    function: Callable[..., torch.Tensor]
    call: Callable[..., training.Call | None]  # its kernel, if there is one for the same arguments
    params: tuple[nn.Parameter, ...] = ()  # of its own, trained

    def again(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Callable[[torch.Tensor], Sequence]]:
        """The result, and a function of its gradients, which gives those of inputs and parameters."""
        n = len(inputs) + len(self.params)
        if (call := self.call(*inputs)) is not None:
            y, gradients = training.with_gradients(*call)
            return y, lambda d_y: gradients(d_y)[:n]
        inputs = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            y = self.function(*inputs)
        return y.detach(), lambda d_y: torch.autograd.grad(y, [*inputs, *self.params], d_y)


class _Recomputed(torch.autograd.Function):
    """A `Recomputable` of inputs, its parameters after them."""

    @staticmethod
    def forward(ctx, of: Recomputable, n: int, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.of = of
        ctx.save_for_backward(*inputs[:n])
        return of.function(*inputs[:n])

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, gradients = ctx.of.again(ctx.saved_tensors)
        return None, None, *gradients(d_y)


def recomputed(of: Recomputable, *inputs: torch.Tensor) -> torch.Tensor:
    """What a function gives; it is computed again for its gradients, and by `linear` that would keep its result."""
    y = _Recomputed.apply(of, len(inputs), *inputs, *of.params)
    y.made_by = of, inputs
    return y


class Linear(torch.autograd.Function):
    """A linear layer of x (..., E), with its gradients by `product`: see `linear`. What `of` has made of `n` inputs is not kept:
    they are, and get the gradients."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        add: Adds | None = None,
        room: Room | None = None,
        of: Recomputable | None = None,
        n: int = 0,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.add, ctx.of, ctx.room = add, of, room
        ctx.memory, (place,) = (None, (None,)) if room is None else room.take(as_rows(x), len(weight))
        plain = [x if weight.requires_grad else None]
        ctx.save_for_backward(weight, *(plain if of is None else inputs[:n]))
        return shaped(product(as_rows(x), weight.T, bias, place), x)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        x, gradients = (kept[0], None) if ctx.of is None else ctx.of.again(kept)
        rows = as_rows(d_y)
        d_x = shaped(product(rows, weight), d_y) if wants_x or gradients else None
        if ctx.add is not None:
            ctx.add(rows.T, as_rows(x))
        d_weight = product(rows.T, as_rows(x)) if wants_weight and ctx.add is None else None
        d_bias = rows.sum(0) if wants_bias else None
        if ctx.room is not None:
            ctx.room.give(ctx.memory)
        if gradients is None:
            return d_x, d_weight, d_bias, None, None, None, None
        return None, d_weight, d_bias, None, None, None, None, *gradients(d_x)


def linear(layer: nn.Linear, x: torch.Tensor, add: Adds | None = None, room: Room | None = None) -> torch.Tensor:
    """What `layer` gives, by `product` on a CPU in one precision; what was made by `recomputed` is not kept. `add` has the
    products that are gradients of the weight, in place of autograd. With a `room` the result is there, until its gradients have
    been taken."""
    weight, bias = layer.weight, layer.bias
    if not are_alike(x, weight):
        return F.linear(x, weight, bias)
    if hasattr(x, "made_by") and weight.requires_grad:
        of, inputs = x.made_by
        return Linear.apply(x.detach(), weight, bias, add, room, of, len(inputs), *inputs, *of.params)
    return Linear.apply(x, weight, bias, add, room)


class _GatedMLP(torch.autograd.Function):
    """An MLP with a gate, of x (..., E): see `gated_mlp`."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        fc_1: torch.Tensor,
        fc_2: torch.Tensor,
        proj: torch.Tensor,
        gate: Recomputable,
        adds: Sequence[Adds],
        room: Room,
        of: Recomputable | None = None,
        n: int = 0,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        rows = as_rows(x)
        memory, places = room.take(rows, len(fc_1), len(fc_2))
        inner = [product(rows, weight.T, to=place) for weight, place in zip((fc_1, fc_2), places, strict=True)]
        ctx.gate, ctx.adds, ctx.of, ctx.room, ctx.memory = gate, adds, of, room, memory
        ctx.save_for_backward(fc_1, fc_2, proj, *inner, *([x] if of is None else inputs[:n]))
        return shaped(product(gate.function(*inner), proj.T), x)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        fc_1, fc_2, proj, *inner = ctx.saved_tensors
        kept, rows = inner[2:], as_rows(d_y)
        y, gradients = ctx.gate.again(inner[:2])
        ctx.adds[2](rows.T, y)
        d_1, d_2 = gradients(product(rows, proj))
        ctx.room.give(ctx.memory)
        x, gradients = (kept[0], None) if ctx.of is None else ctx.of.again(kept)
        ctx.adds[0](d_1.T, as_rows(x))
        ctx.adds[1](d_2.T, as_rows(x))
        d_x = shaped(add_product(product(d_1, fc_1), d_2, fc_2), d_y)
        none = [None] * 8
        return (d_x, *none) if gradients is None else (None, *none, *gradients(d_x))


def gated_mlp(layer: LLaMAMLP, gate: Recomputable, adds: Sequence[Adds], room: Room, x: torch.Tensor) -> torch.Tensor:
    """What an MLP with a gate gives, in one function where it has no biases and is on a CPU in one precision. `adds` have the
    products that are gradients of its weights."""
    layers = layer.fc_1, layer.fc_2, layer.proj
    weights = [of.weight for of in layers]
    if any(of.bias is not None for of in layers) or not are_alike(x, *weights) or not torch.is_grad_enabled():
        return type(layer).forward(layer, x)
    if not hasattr(x, "made_by"):
        return _GatedMLP.apply(x, *weights, gate, adds, room)
    of, inputs = x.made_by
    return _GatedMLP.apply(x.detach(), *weights, gate, adds, room, of, len(inputs), *inputs, *of.params)


class _LowRank(torch.autograd.Function):
    """W x + b + s B A `dropped` of x (N, E) in place of a sum of two results, where W is frozen."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        dropped: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        inner = dropped @ A.T
        ctx.save_for_backward(dropped, A, B, weight, inner)
        ctx.scale = scale
        return product(x, weight.T, bias).addmm_(inner, B.T, alpha=scale)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, A, B, weight, inner = ctx.saved_tensors
        d_inner = (d_y @ B).mul_(ctx.scale)
        return (
            product(d_y, weight) if ctx.needs_input_grad[0] else None,
            d_inner @ A if ctx.needs_input_grad[1] else None,
            d_inner.T @ dropped,
            (d_y.T @ inner).mul_(ctx.scale),
            None,
            None,
            None,
        )


def low_rank(
    layer: LoRALinear, x: torch.Tensor, dropped: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    """`LoRALinear.with_matrices` of a layer, in one function where its weight is frozen and on a CPU in one precision."""
    inner = layer.linear
    frozen = type(inner) is nn.Linear and not any(p.requires_grad for p in inner.parameters())
    if not frozen or not are_alike(x, inner.weight, A) or not A.requires_grad:
        return type(layer).with_matrices(layer, x, dropped, A, B)
    rows = (of.reshape(-1, of.shape[-1]) for of in (x, dropped))
    return shaped(_LowRank.apply(*rows, A, B, inner.weight, inner.bias, layer.scaling), x)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., E) as (N, E)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows y of x (..., E), as they are where x has no others: changing a view's base in place would cost a copy."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def are_alike(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether all are of one precision, on a CPU, and there are rows."""
    alike = all(of.dtype == x.dtype and of.device.type == x.device.type == "cpu" for of in others)
    return alike and bool(x.numel()) and not torch.is_autocast_enabled("cpu")
