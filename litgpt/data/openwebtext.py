"""OpenWebText: pages that people linked to."""

from dataclasses import dataclass
from pathlib import Path

import torch

from litgpt.data.base import DataModule
from litgpt.data.download import load_hub_dataset
from litgpt.data.tokens import TokenRows, encode_files
from litgpt.tokenizer import Tokenizer


@dataclass
class OpenWebText(DataModule):
    """Rows of the pages, from the Hugging Face hub, encoded once.

    Attributes:
        data_path: where the tokens are kept.
        val_split_fraction: part of the pages that validate.
        seed: of the split and the order.
        num_workers: processes that fetch.
    """

    data_path: str | Path = Path("data/openwebtext")
    val_split_fraction: float = 0.0005
    seed: int = 42
    num_workers: int = 8

    tokenizer: Tokenizer | None = None
    batch_size = 1
    seq_length = 2048

    def __post_init__(self) -> None:
        super().__init__()
        self.data_path_train, self.data_path_val = Path(self.data_path) / "train", Path(self.data_path) / "val"

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = 2048
    ) -> None:
        self.tokenizer, self.batch_size, self.seq_length = tokenizer, batch_size, max_seq_length

    def prepare_data(self) -> None:
        self.setup()

    def setup(self, stage: str = "") -> None:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: give --tokenizer_dir")
        data = load_hub_dataset("openwebtext", num_proc=self.num_workers)["train"]
        parts = data.train_test_split(test_size=self.val_split_fraction, seed=self.seed, shuffle=True)
        self.train_rows = self._rows(parts["train"], self.data_path_train)
        self.val_rows = self._rows(parts["test"], self.data_path_val)

    def _rows(self, part: object, folder: Path) -> TokenRows:
        marker = folder / "fingerprint.txt"  # stands for the pages: as long as it is the same, so are the tokens
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.is_file() or marker.read_text(encoding="utf-8") != part._fingerprint:
            marker.write_text(part._fingerprint, encoding="utf-8")
        tokens = encode_files([marker], folder, self.tokenizer, lambda _: (row["text"] for row in part), eos=True)
        return TokenRows(tokens, self.seq_length)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self.train_rows.loader(self.batch_size, self.seed, shuffle=True)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self.val_rows.loader(self.batch_size, self.seed, shuffle=False)
