"""Writes a folder in the layout of Hugging Face, which `transformers` loads without arguments."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.base import HEAD, Checkpoint
from litgpt.checkpoint.files import copy_side_files, write_json, write_safetensors
from litgpt.checkpoint.load import check_weights, is_tied
from litgpt.checkpoint.meta_model import meta_model
from litgpt.checkpoint.weights import WeightMap
from litgpt.config import Config
from litgpt.families import hf_from_config, same_architecture
from litgpt.model import GPT
from litgpt.settings import Settings, read_json

SHARD_BYTES = 5_000_000_000


def save_huggingface(
    source: Checkpoint | GPT,
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes safetensors files, `config.json`, `generation_config.json` and the tokenizer's files.

    Args:
        source: A checkpoint or a model.
        out_dir: Made if it does not exist; must hold no weights yet.
        tokenizer_dir: Where the tokenizer comes from (default: the checkpoint; a model has none).
        dtype: Of the written weights (default: as they are).
        shard_bytes: Most bytes of tensors in a file.
        progress: Called with the name and the bytes of every tensor that was written.

    Raises `ValueError` if no architecture of `transformers` computes the model, or its weights do not fit its config;
    `FileExistsError` if `out_dir` holds weights. Nothing is written then.
    """
    out_dir, config = Path(out_dir), source.config
    if present := [file.name for kind in ("*.safetensors", "pytorch_model*.bin") for file in out_dir.glob(kind)]:
        raise FileExistsError(f"{out_dir} holds weights already ({present[0]}): give another folder")
    family, hf = hf_from_config(config)
    meta = meta_model(config)
    if isinstance(source, Checkpoint):
        check_weights(source, meta)
        tied, stored = source.tied, {name: piece.dtype for name, _, piece in source.pieces(meta=True)}
    else:
        tied, stored = is_tied(source), {name: tensor.dtype for name, tensor in source.state_dict().items()}
    template = {
        name: torch.empty(tensor.shape, dtype=dtype or stored[name], device="meta")
        for name, tensor in meta.state_dict().items()
        if not (tied and name == HEAD)
    }
    weight_map = WeightMap(family, config)
    made_of = weight_map.theirs(list(template))
    layout = {name: weight_map.build(name, sources, template.__getitem__) for name, sources in made_of.items()}
    shards = _shards(layout, shard_bytes)

    side_files = Path(tokenizer_dir) if tokenizer_dir is not None else None
    if side_files is None and isinstance(source, Checkpoint) and source.path.is_dir():
        side_files = source.path
    hf = _original_config(side_files, config) or hf
    hf |= {"tie_word_embeddings": tied, "torch_dtype": str(next(iter(layout.values())).dtype).removeprefix("torch.")}
    hf.pop("dtype", None)
    out_dir.mkdir(parents=True, exist_ok=True)
    if side_files is not None:
        copy_side_files(side_files, out_dir)
    elif isinstance(source, Checkpoint):
        source.copy_side_files(out_dir)
    ids = _token_ids(out_dir)
    if ids and not (out_dir / "generation_config.json").is_file():
        write_json(out_dir / "generation_config.json", ids)
    tensors = source.tensors() if isinstance(source, Checkpoint) else source.state_dict().items()
    write_safetensors(out_dir, shards, _converted(tensors, weight_map, made_of, progress))
    if len(shards) > 1:
        index = {name: file for file, part in shards.items() for name in part}
        total = sum(tensor.nbytes for tensor in layout.values())
        write_json(out_dir / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    write_json(out_dir / "config.json", ids | hf)  # last: without it the folder is no model


def _converted(
    tensors: Iterable[tuple[str, torch.Tensor]],
    weight_map: WeightMap,
    made_of: Mapping[str, tuple[str, ...]],
    progress: Callable[[str, int], None] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Their tensors, each as soon as all of ours that it is made of were read."""
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
                built = weight_map.build(theirs, made_of[theirs], waiting.pop(theirs).__getitem__)
                yield theirs, built.cpu()
                if progress is not None:
                    progress(theirs, built.nbytes)


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


def _original_config(folder: Path | None, config: Config) -> dict[str, Any] | None:
    """The `config.json` that came with the model, if it is one of a text model that computes the same."""
    if folder is None or not (folder / "config.json").is_file():
        return None
    hf = read_json(folder / "config.json")
    try:
        fits = "text_config" not in hf and same_architecture(Config.from_hf(hf, name=config.name), config)
    except ValueError:
        return None
    return hf if fits else None


def _token_ids(folder: Path) -> dict[str, Any]:
    """The special ids, as far as the files next to the model tell them."""
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
