"""What every kind of checkpoint offers, and the choice of the kind from what is on disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from litgpt.checkpoint.files import copy_side_files
from litgpt.config import Config, read_json

if TYPE_CHECKING:
    from litgpt.prompt_style import PromptStyle
    from litgpt.tokenizer import Tokenizer

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
WEIGHTS_NAME, CONFIG_NAME = "lit_model.pth", "model_config.yaml"
# Our parameter name, the row at which the tensor starts in that parameter, the tensor
Piece = tuple[str, int, torch.Tensor]


class Checkpoint(ABC):
    """A model on disk. Opening one reads no weights.

    Attributes:
        path: The folder or file.
    """

    tied = False  # whether input and output embedding are one matrix

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @cached_property
    @abstractmethod
    def config(self) -> Config:
        """The architecture."""

    @cached_property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Data type of the stored weights."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameter names and tensors, the output embedding always included, whole but one at a time."""

    def pieces(self, meta: bool = False) -> Iterator[Piece]:
        """The tensors as they are stored: a parameter may come as several pieces of consecutive rows, in any order.

        With `meta` the tensors have shapes and data types but no values, and no weights are read.
        """
        for name, tensor in self.tensors():
            yield name, 0, tensor.to("meta") if meta else tensor

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a generation, of `generation_config.json` and then `config.json`."""
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            if (file := self.path / name).is_file():
                values = read_json(file)
                ids = values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))
                found += ids if isinstance(ids, list) else [] if ids is None else [ids]
        return list(dict.fromkeys(found))

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer stored with the model."""
        from litgpt.tokenizer import Tokenizer

        return Tokenizer(self.path)

    def copy_side_files(self, out_dir: Path) -> None:
        """Puts the tokenizer, the generation settings and the prompt style into another folder."""
        if self.path.is_dir():
            copy_side_files(self.path, out_dir)
        else:
            self.tokenizer().save(out_dir)

    def prompt_style(self) -> "PromptStyle":
        """The prompt style saved with the model, else its chat template, else what its name calls for."""
        from litgpt.prompts import style_for

        return style_for(self.path, self.tokenizer(), self.config)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder in the layout of Hugging Face or LitGPT, a `.gguf` file, or a folder with one `.gguf` file.

    Raises `FileNotFoundError` if there is no model at `path`, `ValueError` if it cannot be used.
    """
    from litgpt.checkpoint.huggingface import HuggingFaceCheckpoint, holds_weights
    from litgpt.checkpoint.litgpt_folder import LitGPTCheckpoint

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: give a checkpoint folder, a .gguf file or a model name")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{str(path)!r} is a file but no .gguf file: give the folder that holds the checkpoint")
        return _open_gguf(path)
    if (path / WEIGHTS_NAME).is_file():
        return LitGPTCheckpoint(path)
    if holds_weights(path):
        return HuggingFaceCheckpoint(path)
    gguf_files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(gguf_files) == 1:
        return _open_gguf(gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files)
        raise ValueError(f"{str(path)!r} holds several .gguf files ({names}): give the path of one")
    raise FileNotFoundError(
        f"{str(path)!r} holds no weights: expected {WEIGHTS_NAME}, *.safetensors, pytorch_model*.bin or one .gguf file"
    )


def _open_gguf(path: Path) -> Checkpoint:
    from litgpt.checkpoint.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)
