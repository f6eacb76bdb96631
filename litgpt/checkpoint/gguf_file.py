"""The GGUF container: metadata and tensors of one memory-mapped file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Parsed here because the `gguf` package's reader takes
seconds for the vocabularies in the metadata; the quantised blocks are decoded by that package.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt.config import find_multiple

_VERSIONS = (2, 3)
_SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"]))
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` in the order of torch, `offset` and `nbytes` in bytes from the file's begin."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file, opened for reading.

    Attributes: `metadata` (key -> value) and `tensors` (name -> `GGUFTensor`).
    Raises `FileNotFoundError` when there is no such file, `ValueError` in one line when it is not GGUF, of another
    version, one part of several, truncated, or uses a tensor type that the `gguf` package does not know.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{str(self.path)!r} is not a file")
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise self._error(f"is not a GGUF file: it begins with {magic!r}")
            # copy-on-write, since torch wants buffers that it could write to
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._at = 4
        try:
            version = self._scalar("I")
            if version not in _VERSIONS:
                raise self._error(f"has GGUF version {version}; versions 2 and 3 (little endian) can be read")
            n_tensors, n_metadata = self._scalar("Q"), self._scalar("Q")
            self.metadata = {self._string(): self._value(self._scalar("I")) for _ in range(n_metadata)}
            if (parts := self.metadata.get("split.count", 1)) > 1:
                raise self._error(f"is one of {parts} parts; merge them with `llama-gguf-split --merge` first")
            infos = [self._tensor_info() for _ in range(n_tensors)]
        except (struct.error, UnicodeDecodeError, OverflowError, RecursionError, MemoryError):
            raise self._error(f"is truncated or damaged: its header does not end within its {size} bytes") from None
        alignment = self.metadata.get("general.alignment", 32)
        if alignment not in (2**i for i in range(20)):
            raise self._error(f"is damaged: general.alignment = {alignment!r} is no power of two")
        begin = find_multiple(self._at, alignment)
        self.tensors = {name: self._locate(name, *info, begin) for name, *info in infos}
        end = max((t.offset + t.nbytes for t in self.tensors.values()), default=0)
        if end > size:
            raise self._error(f"is truncated: {size} bytes of {end}")

    @property
    def dtype(self) -> torch.dtype:
        """The data type that most weights are stored in; `torch.bfloat16` when they are quantised."""
        numbers: dict[str, int] = {}
        for tensor in self.tensors.values():
            numbers[tensor.kind] = numbers.get(tensor.kind, 0) + math.prod(tensor.shape)
        return _PLAIN.get(max(numbers, key=numbers.__getitem__), torch.bfloat16) if numbers else torch.bfloat16

    def read(self, name: str, meta: bool = False) -> torch.Tensor:
        """A tensor as stored for F32, F16 and BF16 (a view of the file), else dequantised to float32.

        With `meta` it has no values, and nothing is read.
        """
        tensor = self.tensors[name]
        if meta:
            return torch.empty(tensor.shape, dtype=_PLAIN.get(tensor.kind, torch.float32), device="meta")
        if (dtype := _PLAIN.get(tensor.kind)) is not None:
            count = math.prod(tensor.shape)
            return torch.frombuffer(self._data, dtype=dtype, count=count, offset=tensor.offset).view(tensor.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.frombuffer(self._data, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        try:
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType[tensor.kind])
        except NotImplementedError:
            raise self._error(f"stores {name!r} as {tensor.kind}, which cannot be dequantised") from None
        return torch.from_numpy(values)

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} {what}")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > len(self._data) - self._at:
            raise OverflowError
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, length = self._scalar("I"), self._scalar("Q")
            if length > len(self._data) - self._at:
                raise OverflowError
            if (code := _SCALARS.get(kind)) is None:
                return [self._value(kind) for _ in range(length)]
            values = struct.unpack_from(f"<{length}{code}", self._data, self._at)
            self._at += struct.calcsize(f"<{length}{code}")
            return list(values)
        if (code := _SCALARS.get(kind)) is None:
            raise self._error(f"is damaged: its metadata has a value of type {kind}")
        return self._scalar(code)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        n_dims = self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int, begin: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise self._error(f"stores {name!r} in tensor type {kind}, which the gguf package does not know") from None
        block, nbytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise self._error(f"is damaged: {name!r} of shape {shape} is no multiple of {kind.name} blocks")
        return GGUFTensor(shape, kind.name, begin + offset, math.prod(shape) // block * nbytes)
