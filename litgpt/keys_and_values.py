"""Keys and values that queries attend to: as plain tensors, or as numbers of fewer bits. Letters as in `litgpt.attention`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from litgpt.kernels.structs import Vectors

DECODED_SLOTS = 256  # of keys or values that are decoded at once, on a CPU


class KeysAndValues(Protocol):
    """Access to the keys and values that queries attend to, both (B, G, N, D)."""

    def keys(self) -> torch.Tensor: ...

    def values(self) -> torch.Tensor: ...

    def both_in_parallel(self) -> bool:
        """False if `values` may overwrite the result of `keys` (a storage that decodes into one shared buffer)."""
        ...


class DefaultKeysAndValues:
    """Keys and values as plain tensors."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:-1] != values.shape[:-1]:
            raise ValueError(
                f"keys and values must be (B, G, N, D) with equal B, G and N; got {tuple(keys.shape)} and "
                f"{tuple(values.shape)}"
            )
        self._keys, self._values = keys, values

    def keys(self) -> torch.Tensor:
        return self._keys

    def values(self) -> torch.Tensor:
        return self._values

    def both_in_parallel(self) -> bool:
        return True


class VectorCodec(Protocol):
    """How vectors are encoded, each on its own: see `litgpt.kvcache.storages.codecs`."""

    kind: int
    rotated: bool
    parts: dict[str, Any]

    def decode(self, *parts: torch.Tensor) -> torch.Tensor: ...

    def expected_error(self, *parts: torch.Tensor) -> torch.Tensor: ...

    def rotate(self, x: torch.Tensor) -> torch.Tensor: ...


class EncodedKeysAndValues:
    """Keys and values as numbers of fewer bits, which are decoded when they are asked for: all, or a range of them.

    Args:
        codecs: of keys and values, or of keys alone.
        parts: what the codecs made, all (B, G, N, ...), those of keys first.
        dtype: of keys and values.
        value_size: where there is no codec of values: they are the first that many numbers of the keys.
    """

    def __init__(
        self,
        codecs: Sequence[VectorCodec],
        parts: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        value_size: int | None = None,
    ) -> None:
        self.codecs, self.parts, self.dtype, self.value_size = codecs, parts, dtype, value_size

    def keys(self) -> torch.Tensor:
        return self._in_blocks(lambda block: self.codecs[0].rotate(block._decode(0)))

    def values(self) -> torch.Tensor:
        if len(self.codecs) == 1:
            return self.keys()[..., : self.value_size]
        return self._in_blocks(lambda block: self.codecs[1].rotate(block._decode(1)))

    def both_in_parallel(self) -> bool:
        return True

    def _in_blocks(self, decode: Callable[["EncodedKeysAndValues"], torch.Tensor]) -> torch.Tensor:
        """What `decode` makes, on a CPU of few slots at a time: the numbers on the way then take little memory."""
        N, size = self.length, DECODED_SLOTS
        if N <= size or self.parts[0].device.type != "cpu" or torch.compiler.is_compiling():
            return decode(self).to(self.dtype)
        first = decode(self.narrow(0, size))
        found = first.new_empty((*first.shape[:2], N, first.shape[3]), dtype=self.dtype)
        found[:, :, :size] = first
        for start in range(size, N, size):
            found[:, :, start : start + size] = decode(self.narrow(start, start + size))
        return found

    def _decode(self, side: int) -> torch.Tensor:
        first = len(self.codecs[0].parts)
        return self.codecs[side].decode(*(self.parts[first:] if side else self.parts[:first]))

    def expected_errors(self) -> tuple[torch.Tensor, ...]:
        """The norms of what keys and values have lost, as their scales let expect, (B, G, N) each."""
        first = len(self.codecs[0].parts)
        parts = self.parts[:first], self.parts[first:]
        return tuple(codec.expected_error(*own) for codec, own in zip(self.codecs, parts, strict=False))

    @property
    def length(self) -> int:
        """N."""
        return self.parts[0].shape[2]

    @property
    def n_query_groups(self) -> int:
        """G."""
        return self.parts[0].shape[1]

    def narrow(self, start: int, stop: int) -> "EncodedKeysAndValues":
        """Those from `start` up to `stop`."""
        return self._with(tuple(x[:, :, start:stop] for x in self.parts))

    def rotated(self) -> DefaultKeysAndValues:
        """Keys and values as they are encoded: rotated where the codecs rotate."""
        keys = self._in_blocks(lambda block: block._decode(0))
        if len(self.codecs) == 1:
            return DefaultKeysAndValues(keys, keys[..., : self.value_size])
        return DefaultKeysAndValues(keys, self._in_blocks(lambda block: block._decode(1)))

    def for_kernels(self) -> tuple[Vectors, ...]:
        """What `litgpt.kernels` read, by addresses: good as long as this lives. Their kind is 0 where they do not."""
        codes, scales = self.parts[::2], self.parts[1::2]
        kinds = [codec.kind if x.stride(-1) == 1 else 0 for codec, x in zip(self.codecs, codes, strict=True)]
        rotated = (codec.rotated for codec in self.codecs)
        return tuple(map(Vectors.of, kinds, rotated, codes, scales))

    def newest(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """Keys and values that are not encoded, and how many others come first: for kernels, which find that at position p in slot p
        modulo the number of slots. None: all are encoded."""
        return None

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        """Queries for rotated keys."""
        return self.codecs[0].rotate(query)

    def rotate_output(self, output: torch.Tensor) -> torch.Tensor:
        """What sums of rotated values are sums of."""
        return output if len(self.codecs) == 1 else self.codecs[1].rotate(output)

    def _with(self, parts: tuple[torch.Tensor, ...]) -> "EncodedKeysAndValues":
        return EncodedKeysAndValues(self.codecs, parts, self.dtype, self.value_size)


def join(first: KeysAndValues, second: KeysAndValues) -> KeysAndValues:
    """The keys and values of both, one after the other."""
    if isinstance(first, EncodedKeysAndValues) and isinstance(second, EncodedKeysAndValues):
        return first._with(tuple(torch.cat(pair, dim=2) for pair in zip(first.parts, second.parts, strict=True)))
    return DefaultKeysAndValues(
        torch.cat((first.keys(), second.keys()), dim=2), torch.cat((first.values(), second.values()), dim=2)
    )


def both(k_and_v: KeysAndValues) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that can be used at the same time."""
    keys = k_and_v.keys()
    return keys if k_and_v.both_in_parallel() else keys.clone(), k_and_v.values()
