"""A folder in the layout of Hugging Face: `config.json` and safetensors, or `pytorch_model*.bin`."""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.base import EMBEDDING, HEAD, Checkpoint, Piece
from litgpt.checkpoint.files import read_tensors
from litgpt.checkpoint.weights import WeightMap
from litgpt.config import Config, read_json
from litgpt.families import family_of, family_of_hf

_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weights, or the `config.json` of weights that should be there."""
    return any((folder / name).is_file() for name in (*_WEIGHTS, "config.json")) or any(folder.glob("*.safetensors"))


class HuggingFaceCheckpoint(Checkpoint):
    """Opens the folder as it was downloaded or saved, without a conversion step.

    Args:
        path: The folder.
        config: The architecture to read the weights as, instead of what `config.json` says.
    """

    def __init__(self, path: str | Path, config: Config | None = None) -> None:
        super().__init__(path)
        hf: dict[str, Any] = {}
        if (self.path / "config.json").is_file():
            hf = read_json(self.path / "config.json")
        elif config is None:
            raise FileNotFoundError(f"{str(self.path)!r} holds weights but no config.json")
        if hf.get("quantization_config"):
            method = hf["quantization_config"].get("quant_method", "unknown")
            raise ValueError(
                f"{self.path}: weights quantised with {method!r} are not supported; use a copy in bfloat16"
            )
        self.family, text = family_of_hf(hf) if config is None else (family_of(config), hf)
        self._tie = bool(text.get("tie_word_embeddings", self.family.tied))
        if config is not None:
            self.config = config

    @cached_property
    def config(self) -> Config:
        return Config.from_hf(read_json(self.path / "config.json"), name=self.path.name)

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(tensor.dtype for _, _, tensor in self.pieces(meta=True) if tensor.is_floating_point())

    @property
    def _main_file(self) -> Path | None:
        """The index of the files of weights, or the only file."""
        return next((self.path / name for name in _WEIGHTS if (self.path / name).is_file()), None)

    @cached_property
    def index(self) -> dict[str, str]:
        """Names of tensors and of the files that hold them, as an index file says; empty if there is none."""
        main = self._main_file
        if main is None or not main.name.endswith(".index.json"):
            return {}
        weight_map = read_json(main).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{main} lacks a 'weight_map'")
        return weight_map

    @cached_property
    def files(self) -> list[Path]:
        """The files of weights, in the order of their names."""
        main = self._main_file
        if self.index:
            shards = [self.path / shard for shard in sorted(set(self.index.values()))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise FileNotFoundError(f"{main} names {', '.join(missing)}, which {self.path} does not hold")
            return shards
        if main is not None:
            return [main]
        if files := sorted(self.path.glob("*.safetensors")):
            return files
        raise FileNotFoundError(f"{str(self.path)!r} holds a config.json but no *.safetensors or pytorch_model*.bin")

    @cached_property
    def tied(self) -> bool:
        """As `config.json` says, or because no file holds an output embedding."""
        head = self.family.outer["lm_head"] + ".weight"
        return self._tie or not any(name.endswith(head) for file in self.files for name, _ in read_tensors(file))

    def pieces(self, meta: bool = False) -> Iterator[Piece]:
        weight_map = WeightMap(self.family, self.config)
        for file in self.files:
            for their_name, tensor in read_tensors(file):
                for name, row, part in weight_map.place(their_name, tensor.to("meta") if meta else tensor):
                    if name == HEAD and self.tied:
                        continue
                    yield name, row, part
                    if name == EMBEDDING and self.tied:
                        yield HEAD, row, part

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        counts = Counter(name for name, _, _ in self.pieces(meta=True))
        waiting: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for name, row, part in self.pieces():
            parts = waiting.setdefault(name, [])
            parts.append((row, part))
            if len(parts) == counts[name]:
                del waiting[name]
                whole = [part for _, part in sorted(parts, key=lambda entry: entry[0])]
                yield name, whole[0] if len(whole) == 1 else torch.cat(whole)
