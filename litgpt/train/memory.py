"""Where memory of training lies: what stays, apart from what comes and goes.

Activations leave holes where gradients or an optimizer's numbers were put between them, and then the next step's need new
memory.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterable
from functools import partial

import torch


def reserve_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the numbers that a fused Adam or AdamW keeps for every weight, as its first step would."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or group["amsgrad"]:
            continue
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def keep_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Have the gradients of `parameters` in the same memory in every step, one block for all of a kind."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    for (dtype, device), alike in kinds.items():
        sizes = [-(-p.numel() // 16) * 16 for p in alike]  # each begins at a cache line
        block = torch.empty(sum(sizes), dtype=dtype, device=device)
        for p, part in zip(alike, block.split(sizes), strict=True):
            p.register_post_accumulate_grad_hook(partial(_move_gradient, part[: p.numel()].view_as(p)))


def _move_gradient(place: torch.Tensor, p: torch.Tensor) -> None:
    if p.grad is not None and p.grad.data_ptr() != place.data_ptr():
        p.grad = place.copy_(p.grad)


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
