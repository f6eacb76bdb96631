"""Files of saved sessions: safetensors files with checksums over all bytes, replaced atomically."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from litgpt.atomic_file import replacing
from litgpt.checkpoint.files import safetensors_header, tensor_bytes

FORMAT = 1
CHECKSUMS = "checksums"  # name of the last tensor: checksums of the header and of the other tensors
PAGE = 4096  # bytes


@dataclass(frozen=True)
class SessionFile:
    """The contents of a file.

    Attributes:
        path: the file.
        about: everything but the tensors.
        tensors: views of the memory-mapped file.
    """

    path: Path
    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write_session(path: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file atomically: after an interrupt at any point, `path` is the complete old or new file.

    Args:
        path: in a folder that exists.
        about: a JSON object.
        tensors: by name; only one of them is copied at a time.
    """
    layout = {**tensors, CHECKSUMS: torch.empty(1 + len(tensors), dtype=torch.int64)}
    header, _ = safetensors_header(layout, {"session": json.dumps({"format": FORMAT, **about})})
    checksums = [zlib.crc32(header)]
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for tensor in tensors.values():
            data = tensor_bytes(tensor.cpu())
            checksums.append(checksum(data))
            file.write(data)
        file.write(tensor_bytes(torch.tensor(checksums)))


def read_session(path: Path) -> SessionFile:
    """Open a file and verify its checksums.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a session's, of another version, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:  # checks offsets and sizes
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{_unusable(path)}: {' '.join(str(error).split())}") from None
    with open(path, "rb") as file:
        size = file.read(8)
        header = size + file.read(int.from_bytes(size, "little"))
    entries = json.loads(header[8:])
    about = entries.pop("__metadata__", {}).get("session")
    if about is None or CHECKSUMS not in tensors:
        raise ValueError(f"{path} is not a saved session: it holds other tensors")
    checksums = tensors.pop(CHECKSUMS).tolist()
    found = [zlib.crc32(header), *(checksum(tensor_bytes(tensors[name])) for name in entries if name in tensors)]
    if checksums != found:
        raise ValueError(f"{_unusable(path)}: its checksums are not those of what it holds")
    about = json.loads(about)
    if about.pop("format") != FORMAT:
        raise ValueError(f"{path} was saved by another version of this program, in another format: begin a new session")
    return SessionFile(path, about, tensors)


def checksum(data: memoryview) -> int:
    """A checksum of any bytes, at about the speed of memory: a CRC of the sums of pages. It misses only errors that cancel
    each other within a page."""
    values = np.asarray(data)
    whole = len(values) // PAGE * PAGE
    sums = values[:whole].view(np.uint64).reshape(-1, PAGE // 8).sum(axis=1)
    return zlib.crc32(values[whole:], zlib.crc32(sums))


def _unusable(path: Path) -> str:
    return f"{path} is no session, or damaged or incomplete: name another file to begin a new session"
