"""Files of tensors: safetensors and the zip files of `torch.save`, mapped into memory to read, streamed to write."""

import json
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from litgpt.atomic_file import replacing
from litgpt.errors import one_line
from litgpt.git_lfs import refuse_lfs_pointer

GetTensor = Callable[[str], torch.Tensor]
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_REMAP_BYTES = 32_000_000  # or a 32nd of the file, since it takes some milliseconds
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "prompt_style.yaml",
)


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a safetensors or a `torch.save` file; the tensors are views of the file.

    The file is mapped again now and then, so that the pages read before leave memory. Raises `FileNotFoundError`, or
    `ValueError` for a damaged file and for one that holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    names, get_tensor = _open_mapped(path)
    read, most = 0, max(_REMAP_BYTES, path.stat().st_size // 32)
    for name in names:
        if read > most:
            _, get_tensor = _open_mapped(path)
            read = 0
        tensor = get_tensor(name)
        read += tensor.nbytes
        yield name, tensor


def _open_mapped(path: Path) -> tuple[list[str], GetTensor]:
    if path.suffix != ".safetensors":
        weights = load_state_dict(path)
        return list(weights), weights.__getitem__
    file = open_safetensors(path)
    return list(file.keys()), file.get_tensor


def open_safetensors(path: Path) -> safe_open:
    """A safetensors file, opened by its library; `ValueError` if it cannot be read."""
    refuse_lfs_pointer(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {one_line(error)}") from None


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `torch.save` file, mapped into memory; no code in the file is executed.

    A training checkpoint's `model` entry is taken if there is one, and names are those of the model before it was
    compiled. Raises `ValueError` as `read_tensors` does.
    """
    refuse_lfs_pointer(path)
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        # training checkpoints hold the paths they were given
        with torch.serialization.safe_globals([type(Path())]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: a file that cannot be read is an error below
            values = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of type {found[1]}" if found else "something else than a state dict"
        raise ValueError(f"{path} was not loaded: it holds {what}, only tensors are accepted") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {one_line(error)}") from None
    values = values.get("model", values) if isinstance(values, dict) else values
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for name, value in values.items()
    ):
        raise ValueError(f"{path} must hold a state dict: parameter names and dense tensors")
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in values.items()}


def write_state_dict(
    path: Path, layout: Mapping[str, torch.Tensor], row_shards: Iterable[tuple[str, int, torch.Tensor]]
) -> None:
    """Writes a `torch.save` file with one row shard at a time in memory.

    Args:
        layout: Names, and tensors whose shapes and data types count but not their values. Equal storages are stored
            once.
        row_shards: Parameter name, first row and values, which are converted to the data type of the layout.
    """
    with replacing(path) as temporary:
        with torch.serialization.skip_data():
            torch.save(dict(layout), temporary)
        offsets = _storage_offsets(temporary, layout)
        with open(temporary, "r+b") as file:
            for name, row, shard in row_shards:
                row_bytes = layout[name][0].numel() * layout[name].element_size()
                file.seek(offsets[name] + row * row_bytes)
                file.write(tensor_bytes(shard.to(layout[name].dtype)))


def write_safetensors(
    folder: Path,
    layouts: Mapping[str, Mapping[str, torch.Tensor]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes safetensors files, one tensor in memory at a time.

    Args:
        layouts: For each file's name, names and tensors whose shapes and data types count but not their values.
        tensors: Names and values, in any order, which are converted to the data types of the layout.
        metadata: Further texts for every file's header.
    """
    places = {}
    with ExitStack() as stack:
        for file_name, layout in layouts.items():
            header, offsets = safetensors_header(layout, metadata)
            temporary = stack.enter_context(replacing(folder / file_name))
            file = stack.enter_context(open(temporary, "wb"))
            file.write(header)
            for name, tensor in layout.items():
                places[name] = (file, offsets[name], tensor.dtype)
        for name, tensor in tensors:
            file, offset, dtype = places[name]
            file.seek(offset)
            file.write(tensor_bytes(tensor.to(dtype)))


def safetensors_header(
    layout: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and the offset in the file of each tensor of the `layout`, in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins, end = {}, 0
    for name, tensor in layout.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
        begins[name] = begin
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    encoded = len(encoded).to_bytes(8, "little") + encoded
    return encoded, {name: len(encoded) + begin for name, begin in begins.items()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's values, in row-major order."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def parse_dtype(name: str) -> torch.dtype:
    """The floating-point type of torch with a name; `ValueError` if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {name!r} is no floating-point type of torch: float32, bfloat16, float16, ...")
    return dtype


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file as Hugging Face formats it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_side_files(source: Path, out_dir: Path) -> None:
    """Copies the tokenizer, `config.json`, the generation settings and the prompt style, as far as they exist."""
    if source.resolve() == out_dir.resolve():
        return
    for name in SIDE_FILES:
        if (source / name).is_file():
            with replacing(out_dir / name) as temporary:
                shutil.copyfile(source / name, temporary)


def _storage_offsets(path: Path, layout: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The offset of each tensor's values in a `torch.save` file, whose records are numbered in order of first use."""
    numbers: dict[int, int] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {info.filename.partition("/")[2]: info.header_offset for info in archive.infolist()}
        starts = {}
        for name, tensor in layout.items():
            number = numbers.setdefault(tensor.untyped_storage().data_ptr(), len(numbers))
            header = records[f"data/{number}"]
            file.seek(header + 26)  # lengths of the record's name and extra field, which follow the 30-byte header
            name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in range(2))
            starts[name] = header + 30 + name_length + extra_length
        return starts
