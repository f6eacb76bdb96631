"""A folder in the layout of Hugging Face: `config.json` and safetensors, or `pytorch_model*.bin`."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from litgpt.checkpoint.base import EMBEDDING, HEAD, Checkpoint, RowShard
from litgpt.checkpoint.files import read_tensors
from litgpt.checkpoint.weight_files import choose_weight_files, is_no_model, read_weight_map
from litgpt.checkpoint.weights import WeightMap
from litgpt.config import Config
from litgpt.families import family_of, family_of_hf
from litgpt.settings import Settings, read_json

_WEIGHTS = (".safetensors", ".bin", ".index.json")


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weights, or the `config.json` of weights that should be there."""
    return (folder / "config.json").is_file() or any(
        file.name.endswith(_WEIGHTS) and not is_no_model(file.name) for file in folder.iterdir()
    )


class HuggingFaceCheckpoint(Checkpoint):
    """Opens the folder as it was downloaded or saved, without a conversion step.

    Args:
        path: The folder.
        config: The architecture to read the weights as, instead of the one in `config.json`.
    """

    def __init__(self, path: str | Path, config: Config | None = None) -> None:
        super().__init__(path)
        config_path = self.path / "config.json"
        hf = Settings({}, str(config_path))
        if config_path.is_file():
            hf = Settings(read_json(config_path), str(config_path))
        elif config is None:
            raise FileNotFoundError(f"{str(self.path)!r} holds weights but no config.json")
        if config is None:
            self.family, text = family_of_hf(hf)
        else:
            self.family, text = family_of(config), hf
            self.config = config
        for settings in (hf, text):
            for key in ("quantization_config", "compression_config"):
                if settings.is_set(key):
                    method = settings.section(key).text("quant_method", "unknown")
                    raise ValueError(
                        f"{config_path}: weights quantised with {method!r} are not supported; use a copy in bfloat16"
                    )
        self._tie: bool | None = text.flag("tie_word_embeddings", None)

    @cached_property
    def config(self) -> Config:
        return Config.from_hf(self.path / "config.json", name=self.name)

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(tensor.dtype for _, _, tensor in self.row_shards(meta=True) if tensor.is_floating_point())

    @cached_property
    def _chosen(self) -> tuple[list[str], dict[str, str]]:
        names = {file.name for file in self.path.iterdir() if file.is_file()}
        try:
            chosen = choose_weight_files(names, lambda name: read_weight_map(self.path / name))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.path} is incomplete: {error}") from None
        if not chosen[0]:
            raise FileNotFoundError(
                f"{str(self.path)!r} is incomplete: it holds a config.json but no *.safetensors or pytorch_model*.bin; "
                "run the download or the conversion again"
            )
        return chosen

    @property
    def index(self) -> dict[str, str]:
        """Names of tensors -> names of their files, from the index file; empty if none is used."""
        return self._chosen[1]

    @cached_property
    def files(self) -> list[Path]:
        return [self.path / name for name in self._chosen[0]]

    @cached_property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding: `config.json` says so and no file holds another one, or
        it says nothing and no file holds one."""
        if self._tie is False:
            return False
        head_name = self.family.outer["lm_head"] + ".weight"
        embedding_name = self.family.outer["transformer.wte"] + ".weight"
        head = embedding = None
        for name, tensor in self._stored():
            head = tensor if name.endswith(head_name) else head
            embedding = tensor if name.endswith(embedding_name) else embedding
        return head is None or (embedding is not None and torch.equal(head, embedding))

    def _stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors by their names in the files; of one that is in several files, that which the index names."""
        for file in self.files:
            for name, tensor in read_tensors(file):
                if self.index.get(name, file.name) == file.name:
                    yield name, tensor

    def row_shards(self, meta: bool = False) -> Iterator[RowShard]:
        weight_map = WeightMap(self.family, self.config)
        for their_name, tensor in self._stored():
            for name, row, part in weight_map.place(their_name, tensor.to("meta") if meta else tensor):
                if name == HEAD and self.tied:
                    continue
                yield name, row, part
                if name == EMBEDDING and self.tied:
                    yield HEAD, row, part
