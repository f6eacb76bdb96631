"""Numbers of the host as tensors of a device."""

from collections.abc import Sequence

import torch

_positions: dict[torch.device, torch.Tensor] = {}


def device_tensor(numbers: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`torch.tensor(numbers, dtype=dtype, device=device)`, which on a GPU does not wait for what the GPU still has to do."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def position_tensor(position: int, device: torch.device) -> torch.Tensor:
    """`torch.tensor([position], device=device)`, not to be written to: a part of a table, which on a CPU costs less than a new one."""
    if torch.compiler.is_compiling():
        return torch.arange(position, position + 1, device=device)
    table = _positions.get(device)
    if table is None or position >= len(table):
        with torch.inference_mode(False):  # the table outlives the call that makes it
            table = _positions[device] = torch.arange(2 * position + 1024, device=device)
    return table.narrow(0, position, 1)
