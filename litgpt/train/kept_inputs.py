"""Where the inputs of layers stay between the two passes: on the model's device, on the CPU, or in files."""

import tempfile
from collections.abc import Sequence

import torch

PLACES = ("device", "cpu", "disk")


class Kept:
    """Rows of numbers (n, ...) that are kept where they are."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def rows(self, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The rows from each begin to its end, in this order, exactly as they were."""
        parts = [self._rows(begin, end) for begin, end in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        return self.x[begin:end]


class _OnCPU(Kept):
    def __init__(self, x: torch.Tensor) -> None:
        super().__init__(x.to("cpu"))
        self.device = x.device

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        return self.x[begin:end].to(self.device)


class _OnDisk(Kept):
    """In a temporary file, which goes when this object does."""

    def __init__(self, x: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape[1:], x.dtype, x.device
        self.row_bytes = x[:1].numel() * x.element_size()
        self.file = tempfile.TemporaryFile(prefix="litgpt-inputs-")  # noqa: SIM115
        self.file.write(_bytes_of(x.to("cpu").contiguous()))
        self.file.flush()

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        x = torch.empty((end - begin, *self.shape), dtype=self.dtype)
        self.file.seek(begin * self.row_bytes)
        if self.file.readinto(_bytes_of(x)) < x.nbytes:
            raise OSError("the temporary file of a layer's inputs ended early")
        return x.to(self.device)


def _bytes_of(x: torch.Tensor) -> memoryview:
    return memoryview(x.view(-1).view(torch.uint8).numpy())


def keep(x: torch.Tensor, place: str) -> Kept:
    """Put `x` (n, ...) away in one of `PLACES`."""
    return {"device": Kept, "cpu": _OnCPU, "disk": _OnDisk}[place](x.detach())
