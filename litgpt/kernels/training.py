"""Parts of a training step on a CPU by a kernel each, in float32 and bfloat16; other tensors go to torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from litgpt.kernels import ops
from litgpt.kernels.library import training_library

GATES = ("silu", "gelu-tanh")  # activations that are a product with a sigmoid
Call = tuple[Any, ...]  # a function of autograd, and its arguments


class _Context:
    """Stands for autograd's, where all gradients are wanted."""

    needs_input_grad = (True,) * 8

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


def with_gradients(
    kind: type[torch.autograd.Function], *args: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor | None, ...]]]:
    """What a function gives, without autograd, and a function of the gradients of that, which gives those of its arguments."""
    ctx = _Context()
    return kind.forward(ctx, *args), partial(kind.backward, ctx)


def _is_ours(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return (
        first.dtype in (torch.float32, torch.bfloat16)
        and all(x.dtype == first.dtype and x.device.type == "cpu" and x.is_contiguous() for x in tensors)
        and not torch.compiler.is_compiling()
        and training_library() is not None
    )


def _narrow(x: torch.Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


class _Gated(torch.autograd.Function):
    """Activation of a gate times x; only these two are kept."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, x: torch.Tensor, kind: int) -> torch.Tensor:
        ctx.save_for_backward(gate, x)
        ctx.kind, y = kind, torch.empty_like(x)
        training_library().gate_values(gate.data_ptr(), x.data_ptr(), y.data_ptr(), x.numel(), kind, _narrow(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, x = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_gate, d_x = torch.empty_like(gate), torch.empty_like(x)
        addresses = (of.data_ptr() for of in (gate, x, d_y, d_gate, d_x))
        training_library().gate_values_backward(*addresses, x.numel(), ctx.kind, _narrow(x))
        return d_gate, d_x, None


def gate_call(activation: str, gate: torch.Tensor, x: torch.Tensor) -> Call | None:
    """The kernel of an activation of a gate times x, if there is one."""
    if activation not in GATES or not _is_ours(gate, x):
        return None
    return _Gated, gate, x, ops.ACTIVATIONS[activation]


def gated(
    activation: str, plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], gate: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """What `plain` gives for a gate and x, if that is one of `GATES` times x."""
    call = gate_call(activation, gate, x)
    return plain(gate, x) if call is None else call[0].apply(*call[1:])


class _Dropped(torch.autograd.Function):
    """Dropout whose mask is made from a seed, in both passes, and never kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        ctx.p, ctx.seed, y = p, seed, torch.empty_like(x)
        training_library().drop_values(x.data_ptr(), y.data_ptr(), x.numel(), seed, p, _narrow(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Dropped.forward(ctx, d_y.contiguous(), ctx.p, ctx.seed), None, None


def dropout(layer: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    """What a layer of dropout gives."""
    if not layer.training or not 0 < layer.p < 1 or layer.inplace or not _is_ours(x):
        return F.dropout(x, layer.p, layer.training, layer.inplace)
    return _Dropped.apply(x, layer.p, int(torch.randint(2**62, ())))


def replaces_logits(like: torch.Tensor, vocabulary: int) -> bool:
    """Whether `next_token_losses` is there for logits of that type and so many tokens."""
    return _is_ours(like) and vocabulary % 16 == 0


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor | None:
    """Cross-entropies (n,) of logits (n, V), which become their gradients times `scale`; None if there is no kernel."""
    if not replaces_logits(logits, logits.shape[1]):
        return None
    n, V = logits.shape
    losses, labels = logits.new_empty(n, dtype=torch.float32), labels.contiguous()
    training_library().next_token_losses(
        *(of.data_ptr() for of in (logits, labels, losses)), n, V, scale, _narrow(logits)
    )
    torch.autograd.graph.increment_version(logits)  # what has kept them would find other numbers
    return losses


class _Normed(torch.autograd.Function):
    """Root-mean-square norm over the last dimension; only x is kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.numbers, y, size = (eps, offset), torch.empty_like(x), len(weight)
        addresses = (of.data_ptr() for of in (x, weight, y))
        training_library().norm_values(*addresses, x.numel() // size, size, eps, offset, _narrow(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_y, d_x = d_y.contiguous(), torch.empty_like(x)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        size = len(weight)
        factors = x.new_empty(x.numel() // size, dtype=torch.float32)
        addresses = (None if of is None else of.data_ptr() for of in (x, weight, d_y, d_x, d_weight, factors))
        training_library().norm_values_backward(*addresses, len(factors), size, *ctx.numbers, _narrow(x))
        return d_x, d_weight, None, None


def norm_call(layer: nn.Module, x: torch.Tensor) -> Call | None:
    """The kernel of an `RMSNorm`, if there is one."""
    weight = layer.weight
    if not _is_ours(x, weight) or len(weight) % 16 or not x.numel():
        return None
    return _Normed, x, weight, layer.eps, float(layer.add_unit_offset)


def norm(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What an `RMSNorm` gives."""
    call = norm_call(layer, x)
    return type(layer).forward(layer, x) if call is None else call[0].apply(*call[1:])


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_y = d_y if d_y.stride(-1) == 1 else d_y.contiguous()
        return _rotated(d_y, *ctx.saved_tensors, True), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    _, heads, T, D = x.shape
    return rotate_to(x.new_empty(1, T, heads, D).transpose(1, 2), x, cos, sin, back)


def rotate_to(y: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """y (1, heads, T, D), which may be x, with heads of a token one after the other: x by `rotate`, or back. Not differentiable."""
    _, heads, T, D = x.shape
    addresses = (of.data_ptr() for of in (x, cos, sin, y))
    strides = x.stride(2), x.stride(1), y.stride(2)
    training_library().rotate_values(*addresses, T, heads, D, *strides, int(back), _narrow(x))
    return y


def can_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `rotate` is there for heads x (B, heads, T, D) that want gradients."""
    return x.requires_grad and len(x) == 1 and x.stride(-1) == 1 and can_rotate_heads(x.shape[-1], x.dtype, cos, sin)


def can_rotate_heads(size: int, dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether there is a kernel for heads of that size and type."""
    return cos.shape[-1] == size and size % 32 == 0 and _is_ours(cos, sin) and dtype == cos.dtype


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of whole heads (1, heads, T, D) by cosines and signed sines (1, 1, T, D), as `litgpt.rope` has them."""
    return _Rotated.apply(x, cos, sin)
