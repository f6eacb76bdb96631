"""Where the inputs of layers stay between the two passes: on the model's device, on the CPU, or in files."""

import tempfile
from collections.abc import Callable

import torch

PLACES = ("device", "cpu", "disk")


def keep(x: torch.Tensor, place: str) -> Callable[[], torch.Tensor]:
    """Put `x` away in one of `PLACES`; what is returned gives it back, exactly."""
    x, device = x.detach(), x.device
    if place == "device":
        return lambda: x
    there = x.to("cpu")
    if place == "cpu":
        return lambda: there.to(device)
    return _File(there, device).read


class _File:
    """A tensor in a temporary file, which goes when this object does."""

    def __init__(self, x: torch.Tensor, device: torch.device) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, device
        self.file = tempfile.TemporaryFile(prefix="litgpt-inputs-", buffering=0)  # noqa: SIM115
        self._transfer(self.file.write, x.contiguous())

    def read(self) -> torch.Tensor:
        self.file.seek(0)
        x = torch.empty(self.shape, dtype=self.dtype)
        self._transfer(self.file.readinto, x)
        self.file.close()
        return x.to(self.device)

    @staticmethod
    def _transfer(act: Callable[[memoryview], int | None], x: torch.Tensor) -> None:
        rest = memoryview(x.view(-1).view(torch.uint8).numpy())
        while len(rest):
            done = act(rest)
            if not done:
                raise OSError("the temporary file of a layer's inputs ended early")
            rest = rest[done:]
