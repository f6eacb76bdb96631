"""What storages share that keep keys and values in fewer bits."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from litgpt.kernels.structs import Vectors
from litgpt.keys_and_values import DefaultKeysAndValues, EncodedKeysAndValues, KeysAndValues
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import Index, Storage, bits_by_side, move_rows, take, write_slots
from litgpt.kvcache.storages.codecs import Codec
from litgpt.pages import zeros

Parts = tuple[torch.Tensor, ...]


class QuantizedStorage(Storage):
    """Keeps what a codec makes of each token's key and another of its value, when the token comes, and once.

    What `get` gives is decoded when it is asked for, and attention asks for a range of slots at a time. Gradients go straight
    through: while there are any, keys and values as decoded are kept as well, with the graph that they come from.
    """

    has_kernel_codes = True

    def __init__(self, params: KVCacheParams) -> None:
        super().__init__()
        self.codecs = self.codecs_for(params)
        self.value_size = params.value_size
        self._dtype = torch.get_default_dtype() if params.dtype is None else params.dtype
        shape = params.batch_size, params.n_query_groups, params.cache_length
        with torch.inference_mode(False):  # the buffers outlive the call that makes them
            for name, (count, dtype) in _parts(self.codecs).items():
                self.register_buffer(name, zeros((*shape, count), dtype, params.device), persistent=False)

    @classmethod
    @abstractmethod
    def codecs_for(cls, params: KVCacheParams) -> tuple[Codec, ...]:
        """The codec of keys and that of values; the first alone if values are parts of the keys (`value_size`).

        Raises:
            ValueError: if the storage cannot keep those.
        """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedStorage":
        """What `to` and the like call: codes and scales stay what they are, on whatever device."""
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return super()._apply(lambda x: x.to(fn(x).device), recurse)

    # -- one call

    def set(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor | None) -> None:
        parts = self._encode(key.detach(), value.detach())
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad or self._through is not None):
            if self._through is None:
                everything = EncodedKeysAndValues(self.codecs, tuple(self.buffers()), self._dtype, self.value_size)
                self._through = everything.keys(), everything.values()
            self._detach_through()
            for buffer, new in zip(self._through, self._rounded(key, value, parts), strict=True):
                write_slots(buffer, new, slots, rows)
        elif self._through is not None:
            self._through = None
        for buffer, new in zip(self.buffers(), parts, strict=True):
            write_slots(buffer, new, slots, rows)

    def get(self, batch: int, slots: Index, rows: torch.Tensor | None = None) -> KeysAndValues:
        row = slice(batch) if rows is None else rows
        if self._through is not None and torch.is_grad_enabled():
            return DefaultKeysAndValues(*(take(x, row, slots) for x in self._through))
        return self._read(tuple(take(buffer, row, slots) for buffer in self.buffers()))

    def as_stored(self, key: torch.Tensor, value: torch.Tensor) -> KeysAndValues:
        parts = self._encode(key.detach(), value.detach())
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            return DefaultKeysAndValues(*self._rounded(key, value, parts))
        return self._read(parts)

    def _encode(self, key: torch.Tensor, value: torch.Tensor) -> Parts:
        return tuple(part for codec, x in zip(self.codecs, (key, value), strict=False) for part in codec.encode(x))

    def _read(self, parts: Parts) -> EncodedKeysAndValues:
        return EncodedKeysAndValues(self.codecs, parts, self._dtype, self.value_size)

    def _rounded(self, key: torch.Tensor, value: torch.Tensor, parts: Parts) -> list[torch.Tensor]:
        """Keys and values as decoded, whose gradients are those of `key` and `value`."""
        stored = self._read(parts)
        pairs = (key, stored.keys()), (value, stored.values())
        return [decoded + (x - x.detach()) if x.requires_grad else decoded for x, decoded in pairs]

    def kernel_view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._through is not None or len(self.codecs) == 1 or not all(codec.kind for codec in self.codecs):
            return None
        buffers = self._buffers
        return buffers["key_codes"], buffers["value_codes"]

    def kernel_codes(self) -> tuple[Vectors, Vectors]:
        keys, values = self._read(tuple(self.buffers())).for_kernels()
        return keys, values

    # -- slots

    def slot_buffers(self) -> list[torch.Tensor]:
        return [*self.buffers(), *(self._through or ())]

    def select_rows(self, rows: Sequence[int]) -> None:
        move_rows(self.slot_buffers(), rows)

    def state(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        return {name: x[:batch, :, :used] for name, x in self.named_buffers()}

    def compact(self, index: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        self._detach_through()
        super().compact(index, rows)

    def _detach_through(self) -> None:
        if self._through is not None:
            self._through = tuple(x.clone() for x in self._through)

    def detach_writes(self) -> None:
        """Nothing: codes are decoded into new tensors, so autograd has saved none of them; the others are new in each write."""

    def detach_graph(self) -> None:
        if self._through is not None:
            self._through = None

    # -- size and place

    def size_in_bits(self) -> dict[str, int]:
        return bits_by_side({name: 8 * x.numel() * x.element_size() for name, x in self.named_buffers()})

    @classmethod
    def size_in_bits_apriori(cls, params: KVCacheParams) -> dict[str, int]:
        tokens = params.batch_size * params.n_query_groups * params.cache_length
        parts = _parts(cls.codecs_for(params))
        return bits_by_side({name: 8 * tokens * count * dtype.itemsize for name, (count, dtype) in parts.items()})

    @property
    def device(self) -> torch.device:
        return self.key_codes.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype


def _parts(codecs: Sequence[Codec]) -> dict[str, tuple[int, torch.dtype]]:
    """Buffers of a storage with these codecs: names, and how many numbers of which dtype for each slot."""
    return {
        f"{side}_{name}": part
        for side, codec in zip(("key", "value"), codecs, strict=False)
        for name, part in codec.parts.items()
    }
