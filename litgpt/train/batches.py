"""Batches of samples, in an order that a seed decides and that can be resumed anywhere.

A batch has "input_ids" (B, T) and "labels" (B, T), right-padded, with -100 where no loss is counted, and "token_counts", of
which "raw_plus_prompt_template" (B, 1) says how many tokens each row has. Batches of data modules made elsewhere may lack
it: then all rows are as long as T. Batches that are a tensor (B, T + 1) are rows of a text: every token but the first
is a target.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from litgpt.train.loss import IGNORE_INDEX

FlatBatch = tuple[torch.Tensor, torch.Tensor, list[int]]


def as_rows(batch: Any) -> FlatBatch:
    """The rows of a batch one after the other, without padding: tokens (1, N); labels (1, N), each the token that follows or
    -100; and the number of tokens in each row."""
    if isinstance(batch, torch.Tensor):
        B, T = batch.shape
        return batch[:, :-1].reshape(1, -1), batch[:, 1:].reshape(1, -1), [T - 1] * B
    ids, labels = batch["input_ids"], batch["labels"]
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    counts = batch.get("token_counts", {}).get("raw_plus_prompt_template")
    if counts is None:
        return ids.reshape(1, -1), following.reshape(1, -1), [ids.shape[1]] * ids.shape[0]
    lengths = counts.reshape(-1).clamp(max=ids.shape[1])
    used = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids[used][None], following[used][None], lengths.tolist()


def n_batches(loader: DataLoader) -> int | None:
    """Batches of an epoch (None: a stream that has no length)."""
    with suppress(TypeError):
        return len(loader)
    return None


def windows(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Groups of `size` batches, one group for each optimizer step; the last group may be smaller."""
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window


class PackedBatchSampler(BatchSampler):
    """Batches of `rows` rows of at most `capacity` tokens, filled with whole samples, which have `lengths`.

    Which samples share a row is decided once, by best fit in the order of falling lengths, so that every epoch has the same
    number of batches. `generator` draws the order of the rows, anew in every epoch (None: longest samples first).
    """

    def __init__(
        self, lengths: Sequence[int], capacity: int, rows: int, generator: torch.Generator | None = None
    ) -> None:
        if (longest := max(lengths, default=0)) > capacity:
            raise ValueError(f"a sample of {longest} tokens does not fit into rows of {capacity}")
        self.packed, self.rows, self.generator = pack(lengths, capacity), rows, generator

    def __iter__(self) -> Iterator[list[int]]:
        n = len(self.packed)
        order = range(n) if self.generator is None else torch.randperm(n, generator=self.generator).tolist()
        for begin in range(0, n, self.rows):
            yield [index for row in order[begin : begin + self.rows] for index in self.packed[row]]

    def __len__(self) -> int:
        return -(-len(self.packed) // self.rows)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Samples by rows of at most `capacity` tokens: each, the longest first, goes where the least room is left."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the tokens that are free
    free_sizes: list[int] = []  # those that some row has, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free_sizes, lengths[index])
        if at < len(free_sizes):
            free = free_sizes[at]
            row = with_room[free].pop()
            if not with_room[free]:
                del free_sizes[at]
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        free -= lengths[index]
        if not with_room[free]:
            insort(free_sizes, free)
        with_room[free].append(row)
    return rows
