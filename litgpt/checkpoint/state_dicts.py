"""LitGPT's functions that copy one state dict into another, between the names of Hugging Face and ours.

Commands use `open_checkpoint` and `save_huggingface` instead, which never have a whole model in memory.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from litgpt.checkpoint.base import EMBEDDING, HEAD
from litgpt.checkpoint.weights import WeightMap, interleave, split_interleaved
from litgpt.config import Config
from litgpt.families import family_of_type

# LitGPT's function for a group of families -> their `model_type`s
_GROUPS = {
    "gpt_neox": ("gpt_neox",),
    "falcon": ("falcon",),
    "llama": ("llama", "mixtral", "deepseek_v3"),
    "olmo2": ("olmo2",),
    "phi": ("phi", "phi3"),
    "gemma_2": ("gemma2",),
    "gemma_3": ("gemma3_text",),
    "qwen_2_5": ("qwen2",),
    "qwen_3": ("qwen3", "qwen3_moe"),
}
Weights = dict[str, Any]  # names and tensors, or `incremental_save`'s placeholders for them


def copy_to_litgpt(
    group: str,
    config: Config | None,
    qkv_weights: dict[int, dict[str, dict[int, torch.Tensor]]],
    state_dict: Weights,
    hf_weights: Mapping[str, Any],
    saver: Any = None,
    dtype: torch.dtype | None = None,
    pbar: Any = None,
    progress_per_file: float | None = None,
    debug_mode: bool | None = False,
) -> None:
    """Puts Hugging Face's weights into `state_dict` under our names.

    Args:
        group: The group of families whose names they may have.
        config: The architecture; needed only for layouts that depend on it.
        qkv_weights: Layer -> query, key and value weights that were read, but not yet all: they may come in several calls.
        hf_weights: Names and tensors, or objects with `_load_tensor()`.
        saver: An `incremental_save`, which writes each tensor at once.
        dtype: Data type of the result (default: as stored).
        pbar: A progress bar with `update`, advanced by `progress_per_file` in all.
        debug_mode: Print the names.
    """
    maps = [WeightMap(family_of_type(model_type), config) for model_type in _GROUPS[group]]

    def store(name: str, tensor: torch.Tensor) -> None:
        state_dict[name] = tensor if saver is None else saver.store_early(tensor)

    for name, stored in hf_weights.items():
        weights = next((weights for weights in maps if weights.covers(name)), None)
        if weights is None:
            raise ValueError(f"{name!r} is no weight of these architectures: {', '.join(_GROUPS[group])}")
        tensor = load_param(stored, name, dtype, verbose=bool(debug_mode))
        if part := weights.part(name):
            ours, index, count = part
            layer = qkv_weights.setdefault(layer_template(ours)[1], {})
            parts = layer.setdefault(ours, {})
            parts[index] = tensor
            if len(parts) == count:
                store(ours, torch.cat([parts[i] for i in range(count)]))
                del layer[ours]
        else:
            rows: dict[str, list[torch.Tensor]] = {}
            for ours, _, shard in weights.place(name, tensor):
                rows.setdefault(ours, []).append(shard)
            for ours, shards in rows.items():
                store(ours, shards[0] if len(shards) == 1 else torch.cat(shards))
        if pbar is not None and progress_per_file is not None:
            pbar.update(progress_per_file / len(hf_weights))
    if EMBEDDING in state_dict:
        state_dict.setdefault(HEAD, state_dict[EMBEDDING])


def copy_whole_to_litgpt(
    group: str, config: Config, state_dict: Weights, hf_weights: Mapping[str, Any], *args: Any, **kwargs: Any
) -> None:
    """`copy_to_litgpt` for families whose files have queries, keys and values in one matrix."""
    copy_to_litgpt(group, config, {}, state_dict, hf_weights, *args, **kwargs)


def copy_to_litgpt_by_shape(
    group: str,
    qkv_weights: dict[int, Any],
    state_dict: Weights,
    hf_weights: Mapping[str, Any],
    *args: Any,
    config: Config | None = None,
    **kwargs: Any,
) -> None:
    """`copy_to_litgpt` for families whose layouts do not depend on the config."""
    copy_to_litgpt(group, config, qkv_weights, state_dict, hf_weights, *args, **kwargs)


def copy_from_litgpt(
    group: str,
    config: Config,
    state_dict: Weights,
    lit_weights: Mapping[str, Any],
    untie_weights: bool | None = None,
    saver: Any = None,
) -> None:
    """Puts our weights into `state_dict` under the names of the first family of a group that has names for all of them.

    Args:
        group, config, saver: As of `copy_to_litgpt`.
        lit_weights: Names and tensors, or objects with `_load_tensor()`.
        untie_weights: Leave out the output embedding, which is the input embedding (default: for Gemma).
    """
    untie_weights = group.startswith("gemma") if untie_weights is None else untie_weights
    names = [name for name in lit_weights if not (untie_weights and name == HEAD)]
    weights, made_of = _places(group, config, names)
    for name, sources in made_of.items():
        tensor = weights.build(name, sources, lambda source: load_param(lit_weights[source], source, None))
        state_dict[name] = tensor if saver is None else saver.store_early(tensor)


def copy_all_from_litgpt(
    group: str, config: Config, state_dict: Weights, lit_weights: Mapping[str, Any], saver: Any = None
) -> None:
    """`copy_from_litgpt` for families whose files always have an output embedding."""
    copy_from_litgpt(group, config, state_dict, lit_weights, False, saver)


def _places(group: str, config: Config, names: list[str]) -> tuple[WeightMap, dict[str, tuple[str, ...]]]:
    """The weight map of the first family of a group that has names for all of our weights, and its `theirs(names)`."""
    *others, last = [WeightMap(family_of_type(model_type), config) for model_type in _GROUPS[group]]
    for weights in others:
        try:
            return weights, weights.theirs(names)
        except ValueError:
            continue
    return last, last.theirs(names)


def load_param(param: Any, name: str, dtype: torch.dtype | None, verbose: bool = False) -> torch.Tensor:
    """A tensor, or a lazily loaded one with `_load_tensor()`, in `dtype` (default: as stored)."""
    if verbose:
        print(f"Reading {name}")
    tensor = param._load_tensor() if hasattr(param, "_load_tensor") else param
    return tensor if dtype is None else tensor.to(dtype)


def layer_template(layer_name: str, num_matches: int = 1) -> tuple[str | int, ...]:
    """A weight's name with `{}` for its first indices, and the indices: `("model.layers.{}.mlp", 3)`; -1 if it has none."""
    indices = [int(index) for index in re.findall(r"\.(\d+)(?=\.)", layer_name)[:num_matches]]
    return re.sub(r"\.\d+(?=\.)", ".{}", layer_name, count=num_matches), *(indices or [-1])


def qkv_from_interleaved(param: Any, config: Config) -> torch.Tensor:
    """A matrix whose query, key and value rows alternate by head group, with the rows in that order instead."""
    return torch.cat([rows for _, _, rows in split_interleaved("", load_param(param, "", None), config)])


def qkv_to_interleaved(param: Any, config: Config) -> torch.Tensor:
    """The inverse of `qkv_from_interleaved`: rows alternate by head group, q q k v, q q k v, ..."""
    return interleave(load_param(param, "", None), config)


def check_conversion_supported(lit_weights: Mapping[str, Any]) -> None:
    """Raises `ValueError` for LoRA weights and `NotImplementedError` for adapter weights."""
    if any("lora" in name for name in lit_weights):
        raise ValueError("LoRA weights cannot be converted: merge them first (`litgpt merge_lora`)")
    if any("adapter" in name or "gating_factor" in name for name in lit_weights):
        raise NotImplementedError("Converting adapter weights is not possible: no Hugging Face architecture has them")
