"""Chooses the files of a model's weights among the files of a folder."""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from litgpt.settings import Settings, listed, read_json

_FORMATS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)")
# Files that are no model, or of another layout: adapters, the state of a training, Mistral's own files
_NO_WEIGHTS = ("adapter_", "consolidated", "optimizer", "scheduler", "training_args", "random_states", "scaler", "rng_")
_NO_WEIGHTS += ("lit_model",)


def choose_weight_files(
    names: Collection[str], read_index: Callable[[str], dict[str, str]]
) -> tuple[list[str], dict[str, str]]:
    """The files of weights among the files `names`, if there are any, and their index (tensor -> file) if they have one.

    As in transformers: safetensors before pickled files, and a single file before an index, which may be left over from an
    earlier save. Then shards without an index, then any other file with an extension of weights.

    Raises `FileNotFoundError` naming missing shards, `ValueError` for several sets of shards.
    """
    for stem, ending in _FORMATS:
        if stem + ending in names:
            return [stem + ending], {}
        if (index_name := f"{stem}{ending}.index.json") in names:
            index = read_index(index_name)
            chosen = sorted(set(index.values()))
            if missing := [name for name in chosen if name not in names]:
                raise FileNotFoundError(f"{index_name} names {listed(missing)}, not there: fetch or copy the rest")
            return chosen, index
        if chosen := _shards(names, ending, stem):
            return chosen, {}
    for _, ending in _FORMATS:
        rest = [name for name in names if name.endswith(ending) and "/" not in name and not is_no_model(name)]
        if chosen := _shards(rest, ending) or sorted(rest):
            return chosen, {}
    return [], {}


def is_no_model(name: str) -> bool:
    """Whether a file is, by its name, an adapter or the state of a training instead of a model's weights."""
    return name.startswith(_NO_WEIGHTS)


def read_weight_map(path: Path) -> dict[str, str]:
    """The index of a folder's weights, tensor -> file; `ValueError` for files outside of the folder."""
    index = Settings(read_json(path), str(path))
    weight_map = index.section("weight_map")
    if not len(weight_map):
        raise ValueError(f"{path} lacks a 'weight_map'")
    for tensor in weight_map:
        name = weight_map.text(tensor)
        if name != Path(name).name or not name.endswith(tuple(ending for _, ending in _FORMATS)) or "\0" in name:
            raise weight_map.error(tensor, "must be the name of a file of weights in the same folder")
    return {tensor: weight_map.text(tensor) for tensor in weight_map}


def _shards(names: Collection[str], ending: str, stem: str | None = None) -> list[str]:
    """All of a set of shards `STEM-00001-of-00003`, if possible of a complete set."""
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in sorted(names):
        match = _SHARD.fullmatch(name.removesuffix(ending)) if name.endswith(ending) and "/" not in name else None
        if match and (stem is None or match["stem"] == stem):
            sets.setdefault((match["stem"], match["count"]), {})[int(match["number"])] = name
    whole = [list(found.values()) for (_, count), found in sets.items() if set(found) >= set(_numbers(count))]
    if len(whole) > 1:
        raise ValueError(f"there are several sets of weights ({', '.join(files[0] for files in whole)}): keep one")
    if whole or not sets:
        return whole[0] if whole else []
    (found_stem, count), found = max(sets.items(), key=lambda entry: len(entry[1]))
    missing = [
        f"{found_stem}-{number:0{len(count)}}-of-{count}{ending}" for number in _numbers(count) if number not in found
    ]
    raise FileNotFoundError(f"of {count.lstrip('0')} files of weights are missing: {listed(missing)}")


def _numbers(count: str) -> range:
    return range(1, min(int(count), 100_000) + 1)
