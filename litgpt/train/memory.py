"""Where memory of training lies: what stays, apart from what comes and goes.

Activations leave holes where an optimizer's numbers were put between them, and then the next step's need new memory.
"""

import contextlib
import ctypes
import sys

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


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
