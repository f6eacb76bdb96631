"""The command `validate`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from litgpt.checkpoint.base import WEIGHTS_NAME, Checkpoint
from litgpt.checkpoint.files import parse_dtype
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.litgpt_folder import LitGPTCheckpoint
from litgpt.checkpoint.load import check_weights, load_model, weight_differences
from litgpt.checkpoint.meta_model import meta_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.checkpoint.validation import (
    CheckpointValidationResult,
    check_files,
    estimate_model_memory,
    meta_row_shards,
)
from litgpt.config import Config
from litgpt.kvcache.memory import as_text
from litgpt.waiting import waiting

_TEXT = "It is 7 o'clock: (3 + 4) x 2 = 14, said the na\u00efve caf\u00e9 owner."
_BAD_INPUT = (ValueError, OSError, RuntimeError, ImportError, LookupError)
_T = TypeVar("_T")


def validate_setup(
    checkpoint_dir: Path,
    model_filename: str = WEIGHTS_NAME,
    dtype: str = "float32",
    training: bool = False,
) -> None:
    """Check a checkpoint before it is used, and show how much memory it needs.

    Checks the files, the config, names and shapes of the weights, the tokenizer, the prompt style, and the logits of one
    forward pass. Exits with 1 if any check fails.

    Args:
        checkpoint_dir: Folder of a checkpoint (Hugging Face or LitGPT), a .gguf file, or a model's name.
        model_filename: File of the weights, in a LitGPT folder.
        dtype: Data type to compute and to count memory in, say bfloat16.
        training: Also estimate the memory of gradients and AdamW's state.
    """
    torch_dtype, failed = parse_dtype(dtype), []

    def check(name: str, action: Callable[[], tuple[_T, str]]) -> _T | None:
        try:
            with waiting(f"Checking: {name}"):
                value, found = action()
        except _BAD_INPUT as error:
            failed.append(name)
            print(f"failed  {name:9}  {' '.join(str(error).split()) or type(error).__name__}")
            return None
        print(f"ok      {name:9}  {found}")
        return value

    checkpoint = check("files", lambda: _files(checkpoint_dir, model_filename))
    if checkpoint is not None:
        config = check("config", lambda: _config(checkpoint))
        fits = config and check("weights", lambda: _weights(checkpoint))
        tokens = check("tokenizer", lambda: _tokenizer(checkpoint, config))
        if config and tokens is not None:
            check("prompt", lambda: _prompt(checkpoint))
        if fits:
            check("forward", lambda: _forward(checkpoint, torch_dtype, tokens))
        if config:
            print(_memory(checkpoint, torch_dtype, training, bool(fits and checkpoint.tied)))
    if failed:
        print(f"litgpt: error: {checkpoint_dir} is not usable, failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def validate_checkpoint(checkpoint_path: Path, model: nn.Module, verbose: bool = True) -> CheckpointValidationResult:
    """Compare names and shapes of a checkpoint's weights with a model's, without loading them.

    Args:
        checkpoint_path: A file of `torch.save`, or any checkpoint.
        model: The model for the weights.
        verbose: Print the result.
    """
    result = CheckpointValidationResult(False)
    try:
        differences = weight_differences(model.state_dict(), meta_row_shards(Path(checkpoint_path)))
        result = CheckpointValidationResult(not any(differences), *differences)
    except FileNotFoundError as error:
        result.errors.append(f"Checkpoint not found: {error}")
    except (ValueError, OSError) as error:
        result.errors.append(f"Failed to load: {error}")
    if verbose:
        print(result.summary())
    return result


def _files(checkpoint_dir: Path, model_filename: str) -> tuple[Checkpoint, str]:
    path = find_checkpoint(checkpoint_dir)
    if model_filename == WEIGHTS_NAME:
        checkpoint = open_checkpoint(path)
    else:
        checkpoint = LitGPTCheckpoint(path, model_filename)
    size = check_files(checkpoint)
    return checkpoint, f"{', '.join(file.name for file in checkpoint.files)}: {as_text(size)}"


def _config(checkpoint: Checkpoint) -> tuple[Config, str]:
    config = checkpoint.config
    shape = f"{config.n_layer} layers of width {config.n_embd}, context {config.block_size:,}"
    return config, f"{config.name or checkpoint.name}: {shape}"


def _weights(checkpoint: Checkpoint) -> tuple[bool, str]:
    model = meta_model(checkpoint.config)
    check_weights(checkpoint, model)
    how = checkpoint.quantization
    stored = str(checkpoint.dtype).removeprefix("torch.") if how is None else how.mode
    return True, f"{len(model.state_dict())} names and shapes fit the config, stored as {stored}"


def _tokenizer(checkpoint: Checkpoint, config: Config | None) -> tuple[torch.Tensor, str]:
    tokenizer = checkpoint.tokenizer()
    tokens = tokenizer.encode(_TEXT)
    if (back := tokenizer.decode(tokenizer.encode(_TEXT, bos=False)).strip()) != _TEXT:
        raise ValueError(f"{_TEXT!r} is decoded as {back!r}")
    special = [token for token in (tokenizer.bos_id, *tokenizer.eos_ids) if token is not None]
    if config is not None and (largest := max([*tokens.tolist(), *special])) >= config.padded_vocab_size:
        raise ValueError(f"it has a token {largest}, but the model only {config.padded_vocab_size} embeddings")
    return tokens, f"{tokenizer.vocab_size:,} tokens; a text of {len(tokens)} is decoded correctly"


def _prompt(checkpoint: Checkpoint) -> tuple[str, str]:
    style = checkpoint.prompt_style()
    return style.apply(_TEXT), type(style).__name__


def _forward(checkpoint: Checkpoint, dtype: torch.dtype, tokens: torch.Tensor | None) -> tuple[bool, str]:
    model = load_model(checkpoint, dtype)
    size = checkpoint.config.padded_vocab_size
    idx = torch.arange(8) % size if tokens is None or tokens.max() >= size else tokens.long()
    idx = idx[: model.max_seq_length]
    with torch.inference_mode():
        bad = (~model(idx[None]).isfinite()).sum().item()
    if bad:
        raise ValueError(f"{bad:,} logits of {len(idx) * size:,} are not finite in {dtype}")
    return True, f"finite logits for {len(idx)} tokens"


def _memory(checkpoint: Checkpoint, dtype: torch.dtype, training: bool, tied: bool) -> str:
    config, how = checkpoint.config, checkpoint.quantization
    needs = estimate_model_memory(config, dtype, training, tied=tied)
    weights = f"{as_text(needs['param_bytes'])} in {str(dtype).removeprefix('torch.')}"
    if how is not None:
        weights = f"{as_text(sum(file.stat().st_size for file in checkpoint.files))} in {how.mode}"
    per_token, whole = as_text(needs["kv_cache_bytes_per_token"]), as_text(needs["kv_cache_bytes"])
    rows = {
        "parameters": f"{needs['param_count']:,}",
        "weights": weights,
        "key-value cache": f"{per_token} a token, {whole} for the context of {config.block_size:,} tokens",
    }
    if training:
        rows["gradients"] = as_text(needs["gradient_bytes"])
        rows["AdamW's state"] = as_text(needs["optimizer_bytes"])
    return "\n".join(f"{name + ':':17}{value}" for name, value in rows.items())
