"""The interface of all kinds of checkpoints."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from litgpt.checkpoint.files import copy_side_files
from litgpt.config import Config
from litgpt.settings import Settings, read_json

if TYPE_CHECKING:
    from litgpt.prompt_style import PromptStyle
    from litgpt.runners.quantized_weights import Scheme
    from litgpt.tokenizer import Tokenizer

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
WEIGHTS_NAME, CONFIG_NAME = "lit_model.pth", "model_config.yaml"
QUANTIZED_NAME = "lit_model_quantized.safetensors"
# Our parameter name, the parameter's row that is the tensor's first one, the tensor
RowShard = tuple[str, int, torch.Tensor]


class Checkpoint(ABC):
    """A model on disk. Opening one reads no weights.

    Attributes:
        path: The folder or file.
        files: The files of weights.
        config: The architecture.
        dtype: Data type of the stored weights.
        tied: Whether input and output embedding are one matrix.
        quantization: How the weights were quantised by this package (None: not at all).
    """

    files: list[Path]
    config: Config
    dtype: torch.dtype
    tied = False
    quantization: "Scheme | None" = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """The name of the folder or file, with links and `.` resolved for folders."""
        path = self.path.resolve() if self.path.is_dir() else self.path
        return path.name or "model"

    @abstractmethod
    def row_shards(self, meta: bool = False) -> Iterator[RowShard]:
        """All stored parameters, the output embedding included: a parameter may come as several shards of consecutive
        rows, in any order. With `meta`, tensors are on the meta device and no weights are read.
        """

    def stored(self, meta: bool = False) -> Iterator[RowShard]:
        """As `row_shards`, but for a model that is quantised as the checkpoint is."""
        return self.row_shards(meta)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of all parameters, each as soon as all of its row shards were read."""
        counts = Counter(name for name, _, _ in self.row_shards(meta=True))
        waiting: dict[str, dict[int, torch.Tensor]] = {}
        for name, row, shard in self.row_shards():
            shards = waiting.setdefault(name, {})
            shards[row] = shard
            if len(shards) == counts[name]:
                del waiting[name]
                yield name, shard if len(shards) == 1 else torch.cat([shards[row] for row in sorted(shards)])

    @property
    def eos_ids(self) -> list[int]:
        """The ids of the tokens that end a generation, from `generation_config.json` and then `config.json`."""
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            if (file := self.path / name).is_file():
                settings = Settings(read_json(file, repair=name.startswith("generation")), str(file))
                found += (settings if "eos_token_id" in settings else settings.section("text_config")).token_ids(
                    "eos_token_id"
                )
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

    def prompt_style(self, tokenizer: "Tokenizer | None" = None) -> "PromptStyle":
        """The prompt style saved with the model, else its chat template, else the style for its name.

        `tokenizer` is the stored one, where it has been read already.
        """
        from litgpt.prompts import style_for

        return style_for(self.path, tokenizer or self.tokenizer(), self.config)
