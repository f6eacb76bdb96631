"""The GGUF container: metadata and tensors of a file, or of all the shards of a split one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Parsed here because the `gguf` package's reader takes
seconds for the vocabularies in the metadata; quantised blocks are decoded by that package, but for the kinds of gguf_blocks.py.
"""

import io
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt.checkpoint.gguf_blocks import DECODERS, decode_blocks
from litgpt.config import find_multiple
from litgpt.git_lfs import refuse_lfs_pointer
from litgpt.settings import listed

_VERSIONS = (2, 3)
_SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"]))
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 2**22  # numbers that are dequantised at a time, where rows may come in pieces
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


class _OpenFile(io.FileIO):
    """A file that is closed when the last tensor of it is gone."""

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class GGUFTensor:
    """The place of a tensor: `shape` in torch's order, `offset` in bytes from the start of the file."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int
    file: io.FileIO = field(repr=False, compare=False)

    def rows(self, first: int, count: int) -> "GGUFTensor":
        """Some of its rows."""
        row = self.nbytes // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + first * row, nbytes=count * row)

    def bytes(self) -> np.ndarray:
        """Its bytes, mapped into memory for as long as they are used, and not as a part of the whole file, whose pages would stay."""
        start = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        size = self.offset - start + self.nbytes
        # copy-on-write, since torch expects writable buffers
        data = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
        return np.frombuffer(data, dtype=np.uint8, count=self.nbytes, offset=self.offset - start)


class GGUFFile:
    """A GGUF file, opened for reading; the path of any shard of a split file opens all of them.

    Attributes: `metadata` (key -> value), `tensors` (name -> `GGUFTensor`), `paths` (the files) and `stem` (their name
    without the shard's number).
    Raises `FileNotFoundError` for missing files, `ValueError` in one line for a file that is not GGUF, of another version,
    truncated, or has a tensor type that the `gguf` package does not know.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        first = _Shard(self.path)
        count = first.metadata.get("split.count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 100_000:
            raise ValueError(f"{self.path} is damaged: split.count = {count!r}")
        self.stem, self.paths, shards = self.path.stem, [self.path], [first]
        if count > 1:
            self.stem, self.paths = _shard_paths(self.path, count)
            shards = [first if path == self.path else _Shard(path) for path in self.paths]
        self.metadata = shards[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        for number, shard in enumerate(shards):
            if count > 1 and (shard.metadata.get("split.count"), shard.metadata.get("split.no")) != (count, number):
                raise ValueError(f"{shard.path} is not shard {number + 1} of {count}, as its name says")
            if twice := self.tensors.keys() & shard.tensors.keys():
                raise ValueError(f"{shard.path} is damaged: it holds {min(twice)!r} a second time")
            self.tensors |= shard.tensors
        expected = self.metadata.get("split.tensors.count", len(self.tensors)) if count > 1 else len(self.tensors)
        if expected != len(self.tensors):
            raise ValueError(
                f"the {count} shards of {self.stem} hold {len(self.tensors)} tensors instead of {expected}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The data type of most weights; `torch.bfloat16` if they are quantised."""
        numbers: Counter[str] = Counter()
        for tensor in self.tensors.values():
            numbers[tensor.kind] += math.prod(tensor.shape)
        return _PLAIN.get(max(numbers, key=numbers.__getitem__, default=""), torch.bfloat16)

    def pieces(self, name: str, meta: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """As `read`, in pieces of consecutive rows with the first row's number, so that little is dequantised at a time."""
        tensor = self.tensors[name]
        n, size = tensor.shape[0], math.prod(tensor.shape[1:])
        rows = n if tensor.kind in _PLAIN else max(1, PIECE // max(1, size))
        for first in range(0, n, max(1, rows)):
            yield first, self._read(name, tensor.rows(first, min(rows, n - first)), meta)

    def read(self, name: str, meta: bool = False) -> torch.Tensor:
        """A view of the file for F32, F16 and BF16, else the tensor dequantised to float32; with `meta` without values."""
        return self._read(name, self.tensors[name], meta)

    def _read(self, name: str, tensor: GGUFTensor, meta: bool) -> torch.Tensor:
        if meta:
            return torch.empty(tensor.shape, dtype=_PLAIN.get(tensor.kind, torch.float32), device="meta")
        if (dtype := _PLAIN.get(tensor.kind)) is not None:
            return torch.from_numpy(tensor.bytes()).view(dtype).view(tensor.shape)
        if tensor.kind in DECODERS:
            return decode_blocks(tensor.kind, torch.from_numpy(tensor.bytes())).view(tensor.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            values = dequantize(tensor.bytes().reshape(*tensor.shape[:-1], -1), GGMLQuantizationType[tensor.kind])
        except NotImplementedError:
            raise ValueError(f"{self.path} stores {name!r} as {tensor.kind}, which cannot be dequantised") from None
        return torch.from_numpy(values)


def _shard_paths(path: Path, count: int) -> tuple[str, list[Path]]:
    """The name that the shards of a split file share, and all of their paths."""
    match = _SHARD_NAME.fullmatch(path.stem)
    if match is None or int(match["count"]) != count:
        raise ValueError(
            f"{path} is one of {count} shards, whose names must end in -00001-of-{count:05d}{path.suffix} and so on: give "
            "them the names that they had"
        )
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    if missing := [shard.name for shard in paths if not shard.is_file()]:
        raise FileNotFoundError(f"{path} is one of {count} shards, of which {path.parent} lacks {listed(missing, 3)}")
    return match["stem"], paths


def gguf_models(folder: Path) -> list[Path]:
    """The models among the `.gguf` files of a folder, a split one by its first shard; without projectors (`mmproj-...`)."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() == ".gguf" and file.is_file() and not file.name.startswith("mmproj"):
            match = _SHARD_NAME.fullmatch(file.stem)
            found.setdefault(f"{match['stem']} of {match['count']}" if match else file.name, file)
    return list(found.values())


class _Shard:
    """One file: its metadata and the places of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not self.path.is_file():
            raise FileNotFoundError(f"{str(self.path)!r} is not a file")
        refuse_lfs_pointer(self.path)
        size = self.path.stat().st_size
        self._file = _OpenFile(self.path)
        magic = self._file.read(4)
        if magic != b"GGUF":
            raise self._error(f"is not a GGUF file: it begins with {magic!r}")
        self._data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 4
        try:
            version = self._scalar("I")
            if version not in _VERSIONS:
                raise self._error(f"has GGUF version {version}; versions 2 and 3 (little endian) can be read")
            n_tensors, n_metadata = self._scalar("Q"), self._scalar("Q")
            self.metadata: dict[str, Any] = {}
            for _ in range(n_metadata):
                key = self._string()
                if key in self.metadata:
                    raise self._error(f"is damaged: its metadata have {key!r} twice")
                self.metadata[key] = self._value(self._scalar("I"))
            infos = [self._tensor_info() for _ in range(n_tensors)]
        except (struct.error, UnicodeDecodeError, OverflowError, RecursionError, MemoryError):
            raise self._error(f"is truncated or damaged: its header does not end within its {size} bytes") from None
        self._data.close()
        alignment = self.metadata.get("general.alignment", 32)
        if alignment not in (2**i for i in range(20)):
            raise self._error(f"is damaged: general.alignment = {alignment!r} is no power of two")
        begin = find_multiple(self._at, alignment)
        self.tensors = {name: self._locate(name, *info, begin) for name, *info in infos}
        if len(self.tensors) != n_tensors:
            raise self._error("is damaged: it holds two tensors of one name")
        end = max((t.offset + t.nbytes for t in self.tensors.values()), default=0)
        if end > size:
            raise self._error(f"is truncated: {size} bytes of {end}; download it again")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} {what}")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        begin = self._at + 8
        (length,) = _LENGTH.unpack_from(self._data, self._at)
        if length > len(self._data) - begin:
            raise OverflowError
        self._at = begin + length
        return self._data[begin : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, length = self._scalar("I"), self._scalar("Q")
            if length > len(self._data) - self._at:
                raise OverflowError
            if kind == _STRING:
                return [self._string() for _ in range(length)]
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
        return GGUFTensor(shape, kind.name, begin + offset, math.prod(shape) // block * nbytes, self._file)
