"""Checks that a checkpoint is complete and fits a model, and estimates a model's memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.base import HEAD, Checkpoint, RowShard
from litgpt.checkpoint.files import parse_dtype, read_tensors
from litgpt.checkpoint.huggingface import HuggingFaceCheckpoint
from litgpt.checkpoint.meta_model import meta_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config

_GB = 2**30


@dataclass
class CheckpointValidationResult:
    """How the weights of a checkpoint differ from a model's; `errors` say why they could not be read."""

    is_valid: bool
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    shape_mismatches: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line for the result, and one for each kind of difference."""
        if self.is_valid:
            return "Checkpoint validation passed."
        kinds = {
            "Errors": self.errors,
            "Missing keys": self.missing_keys,
            "Unexpected keys": self.unexpected_keys,
            "Shape mismatches": self.shape_mismatches,
        }
        lines = [f"  {kind} ({len(found)}): {', '.join(found)}" for kind, found in kinds.items() if found]
        return "\n".join(["Checkpoint validation failed:", *lines])


def meta_row_shards(path: Path) -> list[RowShard]:
    """Names and shapes of the weights at `path`, a file of `torch.save` or any checkpoint."""
    if path.is_dir() or path.suffix.lower() == ".gguf":
        return list(open_checkpoint(path).row_shards(meta=True))
    return [(name, 0, tensor.to("meta")) for name, tensor in read_tensors(path)]


def check_files(checkpoint: Checkpoint) -> int:
    """Reads the headers of a checkpoint's files of weights, and returns the bytes of the files.

    Raises `FileNotFoundError` or `ValueError`, naming all problems, for files that are missing, truncated or lack tensors
    that the index has in them.
    """
    problems, stored = [], {}
    # the header of a .gguf file was compared with its size when it was opened
    for file in checkpoint.files if checkpoint.path.is_dir() else []:
        try:
            stored[file.name] = {name for name, _ in read_tensors(file)}
        except ValueError as error:
            problems.append(str(error))
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        lacking = [
            f"{name} ({file})" for name, file in checkpoint.index.items() if name not in stored.get(file, {name})
        ]
        problems += [f"not in the file where the index has them: {', '.join(lacking)}"] if lacking else []
    if problems:
        raise ValueError("; ".join(problems))
    return sum(file.stat().st_size for file in checkpoint.files)


def estimate_model_memory(
    config: Config, dtype: str | torch.dtype = torch.float32, training: bool = False, *, tied: bool = False
) -> dict[str, Any]:
    """The memory that a model needs, without building it.

    Args:
        config: The architecture.
        dtype: Of weights, gradients, optimizer state and caches.
        training: Also count gradients and the two averages of AdamW.
        tied: Input and output embedding are one matrix.

    Returns:
        `param_count`; `param_bytes`, `gradient_bytes`, `optimizer_bytes`; `kv_cache_bytes_per_token` and
        `kv_cache_bytes` of default caches, for a token in all layers and for the whole context; `param_memory_gb` and
        `estimated_total_gb` (weights and training, without caches and activations), in units of 2**30 bytes;
        `available_gpu_memory_gb` and `fits_in_memory`, both None without a GPU.
    """
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    model = meta_model(config)
    count = sum(weight.numel() for name, weight in model.named_parameters() if not (tied and name == HEAD))
    weights = count * dtype.itemsize
    gradients, optimizer = (weights, 2 * weights) if training else (0, 0)
    total = weights + gradients + optimizer
    available = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return {
        "param_count": count,
        "param_bytes": weights,
        "gradient_bytes": gradients,
        "optimizer_bytes": optimizer,
        "kv_cache_bytes_per_token": _cache_bytes(config, dtype, 1),
        "kv_cache_bytes": _cache_bytes(config, dtype, config.block_size),
        "param_memory_gb": round(weights / _GB, 2),
        "estimated_total_gb": round(total / _GB, 2),
        "available_gpu_memory_gb": None if available is None else round(available / _GB, 2),
        "fits_in_memory": None if available is None else total <= available,
    }


def _cache_bytes(config: Config, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of default caches for one row of that many tokens."""
    model = meta_model(config)
    model.set_kv_caches(1, dtype, tokens)
    return sum(cache.size_estimate_apriori(cache.get_params())[0] for cache in model.kv_caches()) // 8
