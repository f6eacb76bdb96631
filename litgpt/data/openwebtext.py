"""OpenWebText: pages that people linked to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.data.download import load_hub_dataset
from litgpt.data.tokens import TextModule, encode_files


@dataclass
class OpenWebText(TextModule):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data_path_train, self.data_path_val = Path(self.data_path) / "train", Path(self.data_path) / "val"

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        data = load_hub_dataset("openwebtext", num_proc=self.num_workers)["train"]
        parts = data.train_test_split(test_size=self.val_split_fraction, seed=self.seed, shuffle=True)
        return self._encode(parts["train"], self.data_path_train), self._encode(parts["test"], self.data_path_val)

    def _encode(self, part: Any, folder: Path) -> np.ndarray:
        marker = folder / "fingerprint.txt"  # in place of the pages: while it stays the same, so do the tokens
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.is_file() or marker.read_text(encoding="utf-8") != part._fingerprint:
            marker.write_text(part._fingerprint, encoding="utf-8")
        return encode_files([marker], folder, self.tokenizer, lambda _: (row["text"] for row in part), eos=True)
