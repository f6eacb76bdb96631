"""Gradients that stay where they are from step to step, and those of weights that are added to right there.

Activations leave holes where gradients were put between them, and then the next step's need new memory.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.kernels.matrices import add_product
from litgpt.kernels.structs import Gradient
from litgpt.train.loss import add_rows


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

    def __contains__(self, p: nn.Parameter) -> bool:
        return p in self._places

    def adding(self, p: nn.Parameter) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """A function of two matrices that adds their product to the gradient of `p`."""
        return partial(self._add_product, p)

    def _add_product(self, p: nn.Parameter, a: torch.Tensor, b: torch.Tensor) -> None:
        p.grad = add_product(self._places[p], a, b, adds=p.grad is not None)

    def take(self, p: nn.Parameter) -> Gradient:
        """Where a kernel puts or adds to the gradient of `p`."""
        place, adds = self._places[p], p.grad is not None
        p.grad = place
        return Gradient(place.data_ptr(), adds)

    def embed(self, weight: nn.Parameter, ids: torch.Tensor) -> torch.Tensor:
        """Rows of `weight`, whose gradients are added to its own."""
        return _AddingEmbedding.apply(self._places[weight], weight, ids)


def _move_gradient(place: torch.Tensor, p: nn.Parameter) -> None:
    if p.grad is not None and p.grad.data_ptr() != place.data_ptr():
        p.grad = place.copy_(p.grad)


class _AddingEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, place: torch.Tensor, weight: nn.Parameter, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.place = weight, place
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, d_rows: torch.Tensor) -> tuple[None, None, None]:
        (ids,), weight = ctx.saved_tensors, ctx.weight
        weight.grad = add_rows(ctx.place.zero_() if weight.grad is None else weight.grad, ids, d_rows)
        return None, None, None
