"""Keys and values as they are."""

from collections.abc import Sequence

import torch

from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import Index, Storage, move_rows, register_storage, take, write_slots
from litgpt.pages import zeros


@register_storage("default")
class DefaultStorage(Storage):
    """Keys and values as they are, in two tensors (batch_size, G, C, D); or keys alone, if values are parts of them."""

    def __init__(self, params: KVCacheParams) -> None:
        super().__init__()
        self.value_size = params.value_size
        shape = (params.batch_size, params.n_query_groups, params.cache_length, params.head_size)
        with torch.inference_mode(False):  # the buffers outlive the call that makes them
            for name in ("k", "v"):
                # zeros, not empty: a masked slot has weight 0, and 0 * NaN would be NaN
                stored = name == "k" or params.value_size is None
                buffer = zeros(shape, params.dtype, params.device) if stored else None
                self.register_buffer(name, buffer, persistent=False)

    def _stored(self) -> list[torch.Tensor]:
        return [self.k] if self.v is None else [self.k, self.v]

    def set(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor | None) -> None:
        for buffer, new in zip(self._stored(), (key, value), strict=False):
            write_slots(buffer, new, slots, rows)

    def get(self, batch: int, slots: Index, rows: torch.Tensor | None = None) -> KeysAndValues:
        row = slice(batch) if rows is None else rows
        keys = take(self.k, row, slots)
        return DefaultKeysAndValues(keys, keys[..., : self.value_size] if self.v is None else take(self.v, row, slots))

    def kernel_view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        buffers = self._buffers  # not `self.k`, which takes several times as long, in every layer of every step
        return None if buffers["v"] is None else (buffers["k"], buffers["v"])

    def select_rows(self, rows: Sequence[int]) -> None:
        move_rows(self._stored(), rows)

    def state(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        return {name: x[:batch, :, :used] for name, x in zip(("keys", "values"), self._stored(), strict=False)}

    def size_in_bits(self) -> dict[str, int]:
        bits = [8 * x.numel() * x.element_size() for x in self._stored()]
        return {"keys": bits[0], "values": sum(bits[1:])}

    @classmethod
    def size_in_bits_apriori(cls, params: KVCacheParams) -> dict[str, int]:
        dtype = torch.get_default_dtype() if params.dtype is None else params.dtype
        bits = 8 * dtype.itemsize * params.batch_size * params.n_query_groups * params.cache_length * params.head_size
        return {"keys": bits, "values": bits if params.value_size is None else 0}

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype
