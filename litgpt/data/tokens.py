"""Long texts as one file of tokens, mapped into memory, and rows cut out of it."""

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from litgpt.atomic_file import replacing
from litgpt.data.base import DataModule
from litgpt.data.encoding import cache_dir
from litgpt.tokenizer import Tokenizer
from litgpt.waiting import report_progress, waiting

PART = 1 << 20  # characters of a text that are encoded at a time
GROUP = 8 << 20  # characters of parts that are encoded together, by all cores
VERSION = 2  # of the files


class TokenRows(Dataset):
    """Rows of `seq_length + 1` tokens of a text: each begins with the last token of the one before, so that every token but
    the first is a target once."""

    def __init__(self, tokens: np.ndarray, seq_length: int) -> None:
        self.tokens, self.seq_length = tokens, seq_length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_length)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin = index * self.seq_length
        return torch.from_numpy(self.tokens[begin : begin + self.seq_length + 1].astype(np.int64))

    def loader(self, batch_size: int, seed: int, shuffle: bool) -> DataLoader:
        """Batches (B, seq_length + 1), in an order that `seed` decides; `ValueError` if the text is shorter than a row."""
        if not len(self):
            raise ValueError(
                f"the text for {'training' if shuffle else 'validation'} has {len(self.tokens)} tokens, less than one row of "
                f"{self.seq_length + 1}: use more text, or a smaller --train.max_seq_length"
            )
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle, generator=generator)


class TextModule(DataModule):
    """A data module of texts whose tokens are kept in files. Subclasses have the field `seed`, which decides the order, and say
    where the `tokens` come from."""

    max_seq_length = 2048

    @abstractmethod
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) for training, and those for validation."""

    def prepare_data(self) -> None:
        self.setup()

    def setup(self, stage: str = "") -> None:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: give --tokenizer_dir")
        self.train_rows, self.val_rows = (TokenRows(tokens, self.max_seq_length) for tokens in self.tokens())

    def train_dataloader(self) -> DataLoader:
        return self.train_rows.loader(self.batch_size, self.seed, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.val_rows.loader(self.batch_size, self.seed, shuffle=False)


def files_digest(files: Sequence[Path], tokenizer: Tokenizer, eos: bool = False) -> str:
    """What tells whether tokens made of these files are still theirs."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([VERSION, stats, tokenizer.fingerprint, eos]).encode()).hexdigest()[:32]


def encode_files(
    files: Sequence[Path],
    folder: Path,
    tokenizer: Tokenizer,
    documents: Callable[[Path], Iterable[str]],
    eos: bool = False,
) -> np.ndarray:
    """The tokens (n,) of all documents in some files, one after the other, each after a BOS token where the tokenizer has one.

    They are kept in `folder` (or, where that cannot be written, in the user's cache), and mapped into memory from there as long
    as neither the files nor the tokenizer change.

    Args:
        documents: the documents in a file.
        eos: put an end token after each document; in any case where the tokenizer has no BOS token.
    """
    name = f"tokens-{files_digest(files, tokenizer, eos)}.bin"
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 15 else np.uint32  # added tokens come on top
    if not (path := folder / name).is_file():
        path = _writable(folder) / name
    if not path.is_file():
        for stale in path.parent.glob("tokens-*.bin") if path.parent == folder else ():
            stale.unlink(missing_ok=True)
        texts = (text for file in files for text in documents(file))
        total = sum(file.stat().st_size for file in files)
        with waiting("Encoding text", log=True), replacing(path) as temporary, open(temporary, "wb") as target:
            for tokens in _encoded(texts, tokenizer, eos, total):
                target.write(np.asarray(tokens, dtype=dtype).tobytes())
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _writable(folder: Path) -> Path:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    return cache_dir()


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, eos: bool, total: int) -> Iterator[list[int]]:
    """Tokens of texts, part by part."""
    has_bos, has_eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    group: list[tuple[str, bool, bool]] = []
    size = done = 0
    for text in texts:
        for part, first, last in _parts(text.strip()):
            group.append((part, first and has_bos, last and has_eos and (eos or not has_bos)))
            size += len(part)
            if size >= GROUP:
                yield from tokenizer.encode_batch(group)
                done += size
                if done <= total:  # else the text is not in the files, as that of `OpenWebText`
                    report_progress(done, total)
                group, size = [], 0
    yield from tokenizer.encode_batch(group)


def _parts(text: str) -> Iterator[tuple[str, bool, bool]]:
    """Parts of a text, cut at ends of paragraphs or lines, and whether each is the first and the last one."""
    begin = 0
    while begin < len(text):
        end = begin + PART
        if end < len(text):
            cut = max(text.rfind("\n\n", begin, end), begin) or text.rfind("\n", begin, end)
            end = cut if cut > begin else end
        yield text[begin:end], begin == 0, end >= len(text)
        begin = end
