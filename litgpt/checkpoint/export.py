"""Writes a folder in the layout of Hugging Face, which `transformers` loads without arguments."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.files import write_json, write_safetensors
from litgpt.checkpoint.load import ModelCheckpoint, layout_to_write, reporting
from litgpt.checkpoint.weights import WeightMap
from litgpt.config import Config
from litgpt.families import hf_from_config, same_architecture
from litgpt.model import GPT
from litgpt.settings import Settings, read_json

SHARD_BYTES = 5_000_000_000
_UNFINISHED = ".unfinished_export.json"  # names the files of weights of an export until it is complete


def save_huggingface(
    source: Checkpoint | GPT,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes safetensors files, `config.json`, `generation_config.json` and the tokenizer's files.

    Args:
        source: A checkpoint or a model.
        out_dir: Made if it does not exist; must hold no weights yet, except for an interrupted export's.
        dtype, progress: As of `save_litgpt`.
        shard_bytes: Most bytes of tensors in a file.

    Nothing is written where it raises: `ValueError` if no architecture of `transformers` computes the model, or its weights
    do not fit its config; `FileExistsError` if `out_dir` holds weights.
    """
    source = source if isinstance(source, Checkpoint) else ModelCheckpoint(source)
    out_dir, config = Path(out_dir), source.config
    unfinished = out_dir / _UNFINISHED
    leftovers = read_json(unfinished) if unfinished.is_file() else {}  # of an export that was killed
    present = [file for kind in ("*.safetensors", "pytorch_model*.bin", "lit_model*") for file in out_dir.glob(kind)]
    if others := [file.name for file in present if file.name not in leftovers]:
        raise FileExistsError(f"{out_dir} holds weights already ({others[0]}): give another folder")
    family, hf = hf_from_config(config)
    template = layout_to_write(source, dtype, "meta")
    weight_map = WeightMap(family, config)
    made_of = weight_map.theirs(list(template))
    layout = {name: weight_map.build(name, sources, template.__getitem__) for name, sources in made_of.items()}
    shards = _shards(layout, shard_bytes)

    hf = _original_config(Path(source.path), config) or hf
    hf |= {"tie_word_embeddings": source.tied}
    hf |= {"torch_dtype": str(next(iter(layout.values())).dtype).removeprefix("torch.")}
    hf.pop("dtype", None)
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in present:
        file.unlink()
    write_json(unfinished, dict.fromkeys(shards, True))
    source.copy_side_files(out_dir)
    ids = _token_ids(out_dir)
    if ids and not (out_dir / "generation_config.json").is_file():
        write_json(out_dir / "generation_config.json", ids)
    write_safetensors(out_dir, shards, reporting(_converted(source.tensors(), weight_map, made_of), progress))
    if len(shards) > 1:
        index = {name: file for file, part in shards.items() for name in part}
        total = sum(tensor.nbytes for tensor in layout.values())
        write_json(out_dir / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    write_json(out_dir / "config.json", ids | hf)
    unfinished.unlink()


def _converted(
    tensors: Iterable[tuple[str, torch.Tensor]], weight_map: WeightMap, made_of: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Their tensors, each as soon as all of our parameters for it were read."""
    users: dict[str, list[str]] = {}
    for theirs, sources in made_of.items():
        for name in sources:
            users.setdefault(name, []).append(theirs)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        for theirs in users.get(name, ()):
            parts = waiting.setdefault(theirs, {})
            parts[name] = tensor
            if len(parts) == len(made_of[theirs]):
                yield theirs, weight_map.build(theirs, made_of[theirs], waiting.pop(theirs).__getitem__)


def _shards(layout: Mapping[str, torch.Tensor], shard_bytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """File names and the tensors in each."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in layout.items():
        if parts[-1] and size + tensor.nbytes > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def _original_config(folder: Path, config: Config) -> dict[str, Any] | None:
    """The `config.json` that came with the model, if it describes a text model that computes the same."""
    if not (folder / "config.json").is_file():
        return None
    hf = read_json(folder / "config.json")
    try:
        fits = "text_config" not in hf and same_architecture(Config.from_hf(hf, name=config.name), config)
    except ValueError:
        return None
    return hf if fits else None


def _token_ids(folder: Path) -> dict[str, Any]:
    """The special token ids in the model's files."""
    ids: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            values = Settings(read_json(folder / name, repair=name.startswith("generation")), str(folder / name))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if found := values.token_ids(key):
                    ids[key] = found if len(found) > 1 else found[0]
    if ids:
        return ids
    from litgpt.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer(folder)
    except (FileNotFoundError, ImportError):
        return {}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {key: value for key, value in ids.items() if value is not None}
