"""Keys and values in the memory of the host, for models on a GPU."""

from collections.abc import Callable, Sequence

import torch

from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import Index, register_storage, take
from litgpt.kvcache.storages.default import DefaultStorage


@register_storage("offload")
class OffloadStorage(DefaultStorage):
    """Keys and values as they are, in the host's memory, pinned where there is a GPU. A layer brings what it attends to to its
    device when it is called, so the device holds one layer's keys and values at a time, and each step moves all of them."""

    on_host = True

    def __init__(self, params: KVCacheParams) -> None:
        self._compute = torch.device("cpu") if params.device is None else torch.device(params.device)
        host = self._compute if self._compute.type == "meta" else torch.device("cpu")
        super().__init__(KVCacheParams(**{**vars(params), "device": host}))
        if self._compute.type == "cuda":
            for name, buffer in list(self.named_buffers()):
                setattr(self, name, buffer.pin_memory())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "OffloadStorage":
        """What `to` and the like call: the dtype changes, the place only for what is computed."""
        self._compute = fn(torch.empty(0, device=self._compute)).device
        return super()._apply(lambda x: x.to(fn(x[:0, :0, :0]).dtype), recurse)

    def set(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor | None) -> None:
        super().set(self._to_host(key), self._to_host(value), self._to_host(slots), self._to_host(rows))

    def get(self, batch: int, slots: Index, rows: torch.Tensor | None = None) -> KeysAndValues:
        row = slice(batch) if rows is None else self._to_host(rows)
        slots = slots if isinstance(slots, slice) else self._to_host(slots)
        keys = take(self.k, row, slots).to(self._compute, non_blocking=True)
        if self.v is None:
            return DefaultKeysAndValues(keys, keys[..., : self.value_size])
        return DefaultKeysAndValues(keys, take(self.v, row, slots).to(self._compute, non_blocking=True))

    def select_rows(self, rows: Sequence[int]) -> None:
        self._wait()
        super().select_rows(rows)

    def state(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        self._wait()
        return super().state(batch, used)

    def _wait(self) -> None:
        """Let the GPU finish reading, before the host writes."""
        if self._compute.type == "cuda":
            torch.cuda.synchronize(self._compute)

    def compact(self, index: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        super().compact(self._to_host(index), self._to_host(rows))

    def kernel_view(self) -> None:
        """Kernels read the memory of their device."""

    def _to_host(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(self.k.device)

    @property
    def device(self) -> torch.device:
        return self._compute
