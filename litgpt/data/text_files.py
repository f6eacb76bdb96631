"""Pretraining on plain text files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litgpt.data.tokens import TextModule, encode_files

HELD_BACK = 0.05  # of a single file, for validation


@dataclass
class TextFiles(TextModule):
    """Rows of the `.txt` files in a folder, each file a document.

    Attributes:
        train_data_path: the folder, or one file.
        val_data_path: folder of the files that validate. Default: the first file of `train_data_path`, or, where there is
            one file only, the last 5 % of it.
        seed: of the order.
        num_workers: accepted for scripts written for LitGPT.
    """

    train_data_path: Path
    val_data_path: Path | None = None
    seed: int = 42
    num_workers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train_data_path = Path(self.train_data_path)
        self.val_data_path = None if self.val_data_path is None else Path(self.val_data_path)
        root = self.train_data_path if self.train_data_path.is_dir() else self.train_data_path.parent
        self.out_path_train = root / "train"
        self.out_path_val = (self.val_data_path or root) / "val"

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        train = files_in(self.train_data_path, ".txt")
        val = [] if self.val_data_path is None else files_in(self.val_data_path, ".txt")
        if not val and len(train) > 1:
            val, train = train[:1], train[1:]
        tokens = encode_files(train, self.out_path_train, self.tokenizer, _document)
        if val:
            return tokens, encode_files(val, self.out_path_val, self.tokenizer, _document)
        held_back = max(self.max_seq_length + 1, round(HELD_BACK * len(tokens)))
        return tokens[:-held_back], tokens[-held_back:]


def files_in(path: Path, *suffixes: str, deep: bool = False) -> list[Path]:
    """A file, or those of a folder (`deep`: and of folders in it) with these suffixes; `FileNotFoundError` if there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"the folder {path} does not exist")
    files = sorted(file for file in path.glob("**/*" if deep else "*") if file.suffix in suffixes)
    if not files:
        raise FileNotFoundError(f"{path} holds no {' or '.join(suffixes)} files")
    return files


def _document(file: Path) -> Iterable[str]:
    try:
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte {error.start}") from None
