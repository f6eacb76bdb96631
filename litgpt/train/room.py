"""Memory of what a layer keeps for its backward pass."""

from itertools import accumulate

import torch

from litgpt.kernels.matrices import are_faster
from litgpt.pages import zeros


class Room:
    """The same memory in every step: tensors that come and go between others leave holes."""

    def __init__(self) -> None:
        self._free: torch.Tensor | None = None

    def take(self, x: torch.Tensor, *sizes: int) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """What `give` takes back, and in it places of (N, size) numbers for rows x (N, E), or None where no kernel would write
        to them."""
        if x.dtype != torch.bfloat16 or not are_faster():
            return None, [None] * len(sizes)
        memory, self._free, N = self._free, None, len(x)
        if memory is None or memory.numel() < N * sum(sizes):
            memory = zeros((N * sum(sizes),), x.dtype)
        # tensors of their own, not views: autograd follows changes of views in place
        storage, begins = memory.untyped_storage(), [0, *accumulate(sizes)]
        return memory, [x.new_empty(0).set_(storage, N * at, (N, n)) for at, n in zip(begins, sizes, strict=False)]

    def give(self, memory: torch.Tensor | None) -> None:
        """Let the next `take` have it."""
        self._free = memory
