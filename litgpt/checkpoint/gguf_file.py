"""The GGUF container: metadata and tensors of a memory-mapped file, or of all the parts that one was split into.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Parsed here because the `gguf` package's reader takes
seconds for the vocabularies in the metadata; the quantised blocks are decoded by that package.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt.config import find_multiple
from litgpt.git_lfs import refuse_lfs_pointer

_VERSIONS = (2, 3)
_SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"]))
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` in the order of torch, `offset` and `nbytes` in bytes from the begin of `data`."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int
    data: mmap.mmap = field(repr=False, compare=False)


class GGUFFile:
    """A GGUF file, opened for reading; one of several parts stands for all of them.

    Attributes: `metadata` (key -> value), `tensors` (name -> `GGUFTensor`), `paths` (the files) and `stem` (their name,
    without the number of a part).
    Raises `FileNotFoundError` when there is no such file or when parts of it are missing, `ValueError` in one line when it
    is not GGUF, of another version, truncated, or uses a tensor type that the `gguf` package does not know.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        first = _Part(self.path)
        count = first.metadata.get("split.count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 100_000:
            raise ValueError(f"{self.path} is damaged: split.count = {count!r}")
        self.stem, self.paths, parts = self.path.stem, [self.path], [first]
        if count > 1:
            self.stem, self.paths = _part_paths(self.path, count)
            parts = [first if path == self.path else _Part(path) for path in self.paths]
        self.metadata = parts[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        for number, part in enumerate(parts):
            if count > 1 and (part.metadata.get("split.count"), part.metadata.get("split.no")) != (count, number):
                raise ValueError(f"{part.path} is not part {number + 1} of {count}, as its name says")
            if twice := self.tensors.keys() & part.tensors.keys():
                raise ValueError(f"{part.path} is damaged: it holds {min(twice)!r} a second time")
            self.tensors |= part.tensors
        expected = self.metadata.get("split.tensors.count", len(self.tensors)) if count > 1 else len(self.tensors)
        if expected != len(self.tensors):
            raise ValueError(f"the {count} parts of {self.stem} hold {len(self.tensors)} tensors instead of {expected}")

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
            return torch.frombuffer(tensor.data, dtype=dtype, count=count, offset=tensor.offset).view(tensor.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.frombuffer(tensor.data, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        try:
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType[tensor.kind])
        except NotImplementedError:
            raise ValueError(f"{self.path} stores {name!r} as {tensor.kind}, which cannot be dequantised") from None
        return torch.from_numpy(values)


def _part_paths(path: Path, count: int) -> tuple[str, list[Path]]:
    """The name that the parts of a split file share, and all of their paths."""
    match = _PART_NAME.fullmatch(path.stem)
    if match is None or int(match["count"]) != count:
        raise ValueError(
            f"{path} is one of {count} parts, whose names must end in -00001-of-{count:05d}{path.suffix} and so on: give "
            "the parts the names that they had"
        )
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FileNotFoundError(f"{path} is one of {count} parts, of which {path.parent} lacks {names}")
    return match["stem"], paths


def gguf_models(folder: Path) -> list[Path]:
    """The models among the `.gguf` files of a folder: of a split one the first part that is there.

    Projectors of images or sound (`mmproj-...`), which come beside a model, are left out.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() == ".gguf" and file.is_file() and not file.name.startswith("mmproj"):
            match = _PART_NAME.fullmatch(file.stem)
            found.setdefault(f"{match['stem']} of {match['count']}" if match else file.name, file)
    return list(found.values())


class _Part:
    """One file: its metadata, and its tensors, which are not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not self.path.is_file():
            raise FileNotFoundError(f"{str(self.path)!r} is not a file")
        refuse_lfs_pointer(self.path)
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
            self.metadata: dict[str, Any] = {}
            for _ in range(n_metadata):
                key = self._string()
                if key in self.metadata:
                    raise self._error(f"is damaged: its metadata have {key!r} twice")
                self.metadata[key] = self._value(self._scalar("I"))
            infos = [self._tensor_info() for _ in range(n_tensors)]
        except (struct.error, UnicodeDecodeError, OverflowError, RecursionError, MemoryError):
            raise self._error(f"is truncated or damaged: its header does not end within its {size} bytes") from None
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
        return GGUFTensor(shape, kind.name, begin + offset, math.prod(shape) // block * nbytes, self._data)
