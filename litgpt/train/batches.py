"""Batches of samples, in an order that a seed decides and that can be taken up anywhere.

A batch has "input_ids" (B, T) and "labels" (B, T), right-padded, with -100 where no loss is counted, and "lengths" (B,):
tokens of each row. Batches of data modules made elsewhere may lack "lengths": then all rows are as long as T. Batches that
are a tensor (B, T + 1) are rows of a text: every token but the first is to be foreseen.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler

from litgpt.train.loss import IGNORE_INDEX


def as_rows(batch: Any) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The rows of a batch one after the other, without padding.

    Returns:
        Tokens (1, N); labels (1, N), each the token that follows or -100; and the tokens of each row.
    """
    if isinstance(batch, torch.Tensor):
        B, T = batch.shape
        return batch[:, :-1].reshape(1, -1), batch[:, 1:].reshape(1, -1), [T - 1] * B
    ids, labels = batch["input_ids"], batch["labels"]
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    if "lengths" not in batch:
        return ids.reshape(1, -1), following.reshape(1, -1), [ids.shape[1]] * ids.shape[0]
    lengths = batch["lengths"].tolist()
    used = torch.arange(ids.shape[1]) < batch["lengths"][:, None]
    return ids[used][None], following[used][None], lengths


def counted_tokens(batch: Any) -> int:
    """Tokens of a batch that the loss counts."""
    return int((as_rows(batch)[1] != IGNORE_INDEX).sum())


def windows(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Batches by groups of `size`, those of one optimizer step; the last one may be smaller."""
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window


class ShuffledSampler(Sampler[int]):
    """Indices 0..n-1 in a new random order every epoch, which the seed and the number of the epoch decide alone."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.generator = n, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n, generator=self.generator).tolist())


class PackedBatchSampler(BatchSampler):
    """Batches of as many samples as fit into `rows` rows of `capacity` tokens, no sample cut in two.

    Samples keep their order as far as they fit: each goes to the first open row with room.

    Args:
        sampler: the order of samples.
        lengths: tokens of every sample, none more than `capacity`.
        capacity: tokens of a row.
        rows: rows of a batch.
    """

    def __init__(self, sampler: Sampler[int], lengths: Sequence[int], capacity: int, rows: int) -> None:
        if (longest := max(lengths, default=0)) > capacity:
            raise ValueError(f"a sample of {longest} tokens does not fit into rows of {capacity}")
        self.sampler, self.lengths, self.capacity, self.rows = sampler, lengths, capacity, rows

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[list[int]] = []
        room: list[int] = []
        for index in self.sampler:
            size = self.lengths[index]
            place = next((i for i, free in enumerate(room) if free >= size), None)
            if place is None:
                if len(batch) == self.rows:
                    yield [i for row in batch for i in row]
                    batch, room = [], []
                batch.append([])
                room.append(self.capacity)
                place = len(batch) - 1
            batch[place].append(index)
            room[place] -= size
        if batch:
            yield [i for row in batch for i in row]

    def __len__(self) -> int:
        """About how many batches an epoch has: exact in the order 0, 1, 2, ..., and near it in others."""
        in_order = PackedBatchSampler(range(len(self.lengths)), self.lengths, self.capacity, self.rows)
        return sum(1 for _ in in_order)
