"""TinyStories: stories in the words of small children (arXiv:2305.07759)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from litgpt.data.base import DataModule
from litgpt.data.download import download_if_missing, unpack
from litgpt.data.tokens import TokenRows, encode_files
from litgpt.tokenizer import Tokenizer

_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"


@dataclass
class TinyStories(DataModule):
    """Rows of the stories, fetched once; those of the first file validate.

    Attributes:
        data_path: where the files are kept.
        seed: of the order.
        num_workers: accepted for scripts written for LitGPT.
    """

    data_path: Path = Path("data/tinystories")
    seed: int = 42
    num_workers: int = 8

    tokenizer: Tokenizer | None = None
    batch_size = 1
    max_seq_length = -1

    def __post_init__(self) -> None:
        super().__init__()
        self.data_path = Path(self.data_path)
        self.data_path_train, self.data_path_val = self.data_path / "train", self.data_path / "val"

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        self.tokenizer, self.batch_size, self.max_seq_length = tokenizer, batch_size, max_seq_length

    def prepare_data(self) -> None:
        folder = self.data_path / "TinyStories_all_data"
        if not any(folder.glob("*.json")):
            archive = self.data_path / "TinyStories_all_data.tar.gz"
            download_if_missing(archive, _URL)
            unpack(archive, folder)
        self.setup()

    def setup(self, stage: str = "") -> None:
        files = sorted((self.data_path / "TinyStories_all_data").glob("*.json"))
        if len(files) < 2:
            raise FileNotFoundError(f"{self.data_path}/TinyStories_all_data must hold two .json files or more")
        if self.tokenizer is None:
            raise ValueError("stories need a tokenizer: give --tokenizer_dir")
        self.train_rows = self._rows(files[1:], self.data_path_train)
        self.val_rows = self._rows(files[:1], self.data_path_val)

    def _rows(self, files: list[Path], folder: Path) -> TokenRows:
        return TokenRows(encode_files(files, folder, self.tokenizer, _stories), self.max_seq_length)

    def train_dataloader(self) -> DataLoader:
        return self.train_rows.loader(self.batch_size, self.seed, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.val_rows.loader(self.batch_size, self.seed, shuffle=False)


def _stories(file: Path) -> list[str]:
    return [entry["story"] for entry in json.loads(file.read_text(encoding="utf-8"))]


def tokenize(filename: str | Path, tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """The tokens (T,) of every story in a file, each after a BOS token."""
    for story in _stories(Path(filename)):
        yield tokenizer.encode(story.strip(), bos=True, eos=False)
