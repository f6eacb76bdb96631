"""TinyStories: stories in the words of small children (arXiv:2305.07759)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from litgpt.data.download import download_if_missing, unpack
from litgpt.data.tokens import TextModule, encode_files
from litgpt.tokenizer import Tokenizer

_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"


@dataclass
class TinyStories(TextModule):
    """Rows of the stories, fetched once; those of the first file validate.

    Attributes:
        data_path: where the files are kept.
        seed: of the order.
        num_workers: accepted for scripts written for LitGPT.
    """

    data_path: Path = Path("data/tinystories")
    seed: int = 42
    num_workers: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data_path = Path(self.data_path)
        self.data_path_train, self.data_path_val = self.data_path / "train", self.data_path / "val"

    def prepare_data(self) -> None:
        folder = self.data_path / "TinyStories_all_data"
        if not any(folder.glob("*.json")):
            archive = self.data_path / "TinyStories_all_data.tar.gz"
            download_if_missing(archive, _URL)
            unpack(archive, folder)
        self.setup()

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        val, *train = sorted((self.data_path / "TinyStories_all_data").glob("*.json")) or [None]
        if not train:
            raise FileNotFoundError(f"{self.data_path}/TinyStories_all_data must hold two .json files or more")
        return (
            encode_files(train, self.data_path_train, self.tokenizer, _stories),
            encode_files([val], self.data_path_val, self.tokenizer, _stories),
        )


def _stories(file: Path) -> list[str]:
    return [entry["story"] for entry in json.loads(file.read_text(encoding="utf-8"))]


def tokenize(filename: str | Path, tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """The tokens (T,) of every story in a file, each after a BOS token."""
    for story in _stories(Path(filename)):
        yield tokenizer.encode(story.strip(), bos=True, eos=False)
