"""Gradients that stay where they are from step to step, and large ones that are added to right there.

Activations leave holes where gradients were put between them, and then the next step's need new memory.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.train.loss import add_rows
from litgpt.train.products import product


class KeptGradients:
    """Gradients of parameters that lie in the same memory in every step, one block for all of a kind."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in parameters:
            kinds.setdefault((p.dtype, p.device), []).append(p)
        self._places: dict[nn.Parameter, torch.Tensor] = {}
        for (dtype, device), alike in kinds.items():
            sizes = [-(-p.numel() // 16) * 16 for p in alike]  # each begins at a cache line
            block = torch.empty(sum(sizes), dtype=dtype, device=device)
            for p, part in zip(alike, block.split(sizes), strict=True):
                self._places[p] = place = part[: p.numel()].view_as(p)
                p.register_post_accumulate_grad_hook(partial(_move_gradient, place))

    def of(self, p: nn.Parameter) -> torch.Tensor:
        """The gradient of `p`, to be added to: zeros if there was none."""
        if p.grad is None:
            p.grad = self._places[p].zero_()
        return p.grad

    def adding(self, *modules: nn.Module) -> dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
        """Functions that can stand for some of these modules, and add to the gradients of their weights."""
        if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return {}
        kinds = {nn.Linear: _AddingLinear, nn.Embedding: _AddingEmbedding}
        plain = (module for module in modules if type(module) in kinds and getattr(module, "bias", None) is None)
        return {
            module: partial(kinds[type(module)].apply, self, module.weight)
            for module in plain
            if module.weight in self._places and module.weight.dtype in (torch.float32, torch.float64)
        }


def _move_gradient(place: torch.Tensor, p: nn.Parameter) -> None:
    if p.grad is not None and p.grad.data_ptr() != place.data_ptr():
        p.grad = place.copy_(p.grad)


class _AddingLinear(torch.autograd.Function):
    """A linear layer of inputs (N, E)."""

    @staticmethod
    def forward(ctx, kept: KeptGradients, weight: nn.Parameter, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.kept = weight, kept
        return product(x, weight)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.kept.of(ctx.weight).addmm_(d_y.T, x)
        return None, None, product(d_y, ctx.weight.T) if ctx.needs_input_grad[2] else None


class _AddingEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept: KeptGradients, weight: nn.Parameter, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.kept = weight, kept
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, d_rows: torch.Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        add_rows(ctx.kept.of(ctx.weight), ids, d_rows)
        return None, None, None
