"""What data modules are: they give batches of samples for training and validation."""

import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from litgpt.chat_template import ChatTemplate
from litgpt.data.encoding import EncodedSamples, Sample, Splits, render_prompt
from litgpt.prompt_style import PromptStyle
from litgpt.prompts import bos_of
from litgpt.tokenizer import Tokenizer
from litgpt.train.batches import PackedBatchSampler
from litgpt.train.loss import IGNORE_INDEX

_logger = logging.getLogger("litgpt")


class DataModule(LightningDataModule):
    """Gives batches. A command calls `connect`, `prepare_data`, `setup`, and then asks for the loaders."""

    tokenizer = None
    batch_size = 1
    max_seq_length = -1

    def __post_init__(self) -> None:  # of those that are dataclasses
        super().__init__()

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Take what the run decides: the tokenizer, samples of a batch, and tokens that a sample is cut to (None: the class's)."""
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_seq_length = type(self).max_seq_length if max_seq_length is None else max_seq_length

    def setup(self, stage: str = "") -> None:
        """Read the data. `stage` is Lightning's, and not needed."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(eq=False, repr=False)
class SFTDataset(Dataset):
    """Samples of instructions and responses as tokens. All are encoded when the first one is used: see `EncodedSamples.of`."""

    data: Sequence[Mapping[str, Any]]  # `instruction`, `output` and perhaps `input`; or `messages`, a conversation
    tokenizer: Tokenizer
    prompt_style: str | PromptStyle  # renders instructions; conversations need one that takes messages
    max_seq_length: int = -1  # samples are cut to that many tokens (-1: not)
    mask_prompt: bool = True  # count the loss on responses only
    ignore_index: int = IGNORE_INDEX  # label of tokens that are not counted
    transform: Callable[[Any], Any] | None = None  # applied to every sample first

    name = "samples"  # in messages

    def __post_init__(self) -> None:
        if isinstance(self.prompt_style, str):
            self.prompt_style = PromptStyle.from_name(self.prompt_style)

    def sample(self, index: int) -> Sample:
        return self.data[index] if self.transform is None else self.transform(self.data[index])

    @cached_property
    def encodings(self) -> EncodedSamples:
        samples = [self.sample(index) for index in range(len(self.data))]
        return EncodedSamples.of(samples, self.tokenizer, self.prompt_style, self.name)

    def __len__(self) -> int:
        """A conversation may count as several samples: see `EncodedSamples`."""
        return len(self.encodings) if len(self.data) else 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return [min(n, self._limit) for n in self.encodings.lengths]

    @property
    def _limit(self) -> int:
        return sys.maxsize if self.max_seq_length < 0 else self.max_seq_length

    def _tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (T,) of a sample, and whether the loss counts them (T,)."""
        ids, counted, _ = self.encodings[index]
        return ids[: self._limit], counted[: self._limit] | (not self.mask_prompt)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` (T,), `labels` (T,) the same with `ignore_index` where no loss is counted, and `token_counts`."""
        ids, counted = map(torch.from_numpy, self._tokens(index))
        ids = ids.long()
        counts = {"raw": self.encodings[index].raw, "raw_plus_prompt_template": len(ids)}
        return {"input_ids": ids, "labels": ids.masked_fill(~counted, self.ignore_index), "token_counts": counts}

    def check_learned(self) -> None:
        """`ValueError` if the loss counts no token of any sample; a warning if it counts none of some."""
        empty = sum(not self._tokens(index)[1][1:].any() for index in range(len(self.encodings)))
        if empty == len(self):
            raise ValueError(f"{self.name}: no sample has a token to be learned")
        if empty:
            _logger.warning(
                f"{self.name}: {empty} of {len(self)} samples have no token to be learned within {max(self.lengths)} tokens"
            )

    def example(self, index: int) -> tuple[str, Tensor]:
        """What a sample asks, and the tokens (T,) of its prompt."""
        asked, text = render_prompt(self.sample(self.encodings.source[index]), self.prompt_style)
        return asked, self.tokenizer.encode(text, bos=bos_of(text, self.tokenizer, self.prompt_style))


def get_sft_collate_fn(
    max_seq_length: int = -1, pad_id: int = 0, ignore_index: int = IGNORE_INDEX
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A function that makes a batch of samples: right-padded with `pad_id` and `ignore_index`, and cut to `max_seq_length`
    (-1: not). The batch also has the samples' `token_counts`."""
    return partial(_sft_collate_fn, max_seq_length=max_seq_length, pad_id=pad_id, ignore_index=ignore_index)


def _sft_collate_fn(samples: list, max_seq_length: int, pad_id: int, ignore_index: int) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for key, filler in (("input_ids", pad_id), ("labels", ignore_index)):
        rows = torch.nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=filler)
        batch[key] = rows[:, :max_seq_length] if max_seq_length > 0 else rows
    if "token_counts" in samples[0]:
        counts = default_collate([sample["token_counts"] for sample in samples])
        batch["token_counts"] = {name: of_samples[:, None] for name, of_samples in counts.items()}
    return batch


def no_option() -> Any:
    """A field of the base class that has no meaning here: it is always None."""
    return field(default=None, init=False, repr=False)


@dataclass
class SFTModule(DataModule):
    """A data module of instructions and responses, or conversations. Subclasses say where `samples` are.

    Attributes:
        mask_prompt: learn responses only, not instructions.
        val_split_fraction: part of the samples that validate.
        prompt_style: renders instructions (None: the model's own).
        ignore_index: label of tokens that are not learned.
        seed: of the split and of the order.
        num_workers: accepted for scripts written for LitGPT; samples are encoded once, and need no workers.
    """

    mask_prompt: bool = False
    val_split_fraction: float | None = None
    prompt_style: str | PromptStyle = "alpaca"
    ignore_index: int = IGNORE_INDEX
    seed: int = 42
    num_workers: int = 4

    train_dataset = test_dataset = None  # an `SFTDataset` each, after `setup`
    follows_checkpoint = False  # the prompt style is its own
    pack = False  # fill rows with several samples: `train.pack`

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.prompt_style, str):
            self.prompt_style = PromptStyle.from_name(self.prompt_style)
        if self.val_split_fraction is not None and not 0 <= self.val_split_fraction < 1:
            raise ValueError(f"val_split_fraction must be at least 0 and below 1, got {self.val_split_fraction}")

    @abstractmethod
    def samples(self) -> Splits:
        """Where they come from."""

    def setup(self, stage: str = "") -> None:
        if self.prompt_style is None or self.follows_checkpoint:
            self.use_own_style()
        train, test = self.samples()  # which may choose style and mask
        settings = (self.tokenizer, self.prompt_style, self.max_seq_length, self.mask_prompt, self.ignore_index)
        self.train_dataset, self.test_dataset = SFTDataset(train, *settings), SFTDataset(test, *settings)

    def use_own_style(self) -> None:
        """Take the checkpoint's chat template, or Alpaca's style where it has none; in a later run that checkpoint's."""
        has_template = getattr(self.tokenizer, "chat_template", None)
        own = ChatTemplate.from_tokenizer(self.tokenizer) if has_template else PromptStyle.from_name("alpaca")
        self.prompt_style, self.follows_checkpoint = own, True

    def split(self, data: Sequence[Sample]) -> tuple[list, list]:
        """Training and validation samples, drawn by `seed`."""
        if not self.val_split_fraction or len(data) * self.val_split_fraction < 1:
            return list(data), []
        generator = torch.Generator().manual_seed(self.seed)
        parts = [1.0 - self.val_split_fraction, self.val_split_fraction]
        train, val = torch.utils.data.random_split(data, parts, generator=generator)
        return list(train), list(val)

    def loader(self, dataset: SFTDataset, shuffle: bool) -> DataLoader:
        """Batches of a dataset, in an order that `seed` decides if they are shuffled."""
        dataset.name = f"{type(self).__name__} ({'training' if shuffle else 'validation'})"
        dataset.check_learned()
        collate = get_sft_collate_fn(self.max_seq_length, ignore_index=self.ignore_index)
        generator = torch.Generator().manual_seed(self.seed)
        if self.pack:
            capacity = self.max_seq_length if self.max_seq_length > 0 else max(dataset.lengths)
            batches = PackedBatchSampler(dataset.lengths, capacity, self.batch_size, generator if shuffle else None)
            return DataLoader(dataset, batch_sampler=batches, generator=generator, collate_fn=collate)
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader | None:
        return self.loader(self.test_dataset, shuffle=False) if len(self.test_dataset.data) else None
