"""The rows of a batch: joining sequences get free ones, and those of finished sequences are dropped or kept idle."""

from collections import abc

from litgpt.engine.sequence import Sequence
from litgpt.model import GPT


class Rows:
    """The sequences of a batch, by row of the caches.

    Args:
        model: with caches.
        batch_size: fixed number of rows, some of them idle (None: one for each sequence; with static shapes, the largest
            number of sequences so far).
    """

    def __init__(self, model: GPT, batch_size: int | None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.sequences: list[Sequence | None] = []  # None: the row is idle

    @property
    def active(self) -> list[Sequence]:
        """Sequences that are not finished."""
        return [one for one in self.sequences if one is not None and one.finish_reason is None]

    @property
    def decoding(self) -> list[int]:
        """Rows of sequences in their decode steps."""
        return [i for i, one in enumerate(self.sequences) if one is not None and one.is_decoding]

    def free(self, count: int) -> list[int]:
        """`count` rows without an active sequence; unused rows of the caches join the batch if there are too few."""
        free = [i for i, one in enumerate(self.sequences) if one is None or one.finish_reason]
        self._extend(len(self.sequences) + count - len(free))
        free += range(len(self.sequences) - max(0, count - len(free)), len(self.sequences))
        return free[:count]

    def empty(self, rows: abc.Sequence[int]) -> None:
        """Clear these rows of the caches."""
        lengths = self.model.caches.row_lengths
        self.model.caches.rewind([length if i in rows else 0 for i, length in enumerate(lengths)])

    def place(self, sequences: abc.Sequence[Sequence], rows: abc.Sequence[int]) -> None:
        """Assign rows to sequences."""
        for sequence, row in zip(sequences, rows, strict=True):
            self.sequences[row] = sequence
        self._extend(self.batch_size or 0)

    def _extend(self, count: int) -> None:
        missing = count - len(self.sequences)
        if missing > 0:
            self.model.caches.extend(missing)
            self.sequences += [None] * missing

    def remove_finished(self) -> None:
        """Drop the rows of finished sequences, filling each gap with the last row: one copy a dropped row.

        Batches of a fixed size keep them, empty and idle.
        """
        rows = self.sequences
        finished = [i for i, one in enumerate(rows) if one is not None and one.finish_reason]
        if not finished:
            return
        if self.batch_size is not None or self.model.static_shapes:
            self.empty(finished)
            for i in finished:
                rows[i] = None
            return
        order = list(range(len(rows)))
        for i in reversed(finished):
            order[i], rows[i] = order[-1], rows[-1]
            order.pop(), rows.pop()
        if order:
            self.model.caches.reorder(order)
        else:
            self.model.caches.crop(0)
