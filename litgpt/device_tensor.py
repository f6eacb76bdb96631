"""Numbers of the host as tensors of a device."""

from collections.abc import Sequence

import torch


def device_tensor(numbers: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`torch.tensor(numbers, dtype=dtype, device=device)`, which on a GPU does not wait for what the GPU still has to do."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
