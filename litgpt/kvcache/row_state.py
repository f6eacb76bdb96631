"""What the host knows of the rows in a cache."""

from collections.abc import Iterable, Sequence


class RowState:
    """What changes with every call: for each of a cache's `ROW_FIELDS` one integer a row in use. The first ones are lengths."""

    __slots__ = ("fields",)

    def __init__(self, *fields: tuple[int, ...]) -> None:
        self.fields = fields

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens so far of every row."""
        return self.fields[0]

    def of(self, rows: Iterable[int]) -> "RowState":
        """Row i is what row `rows[i]` is here."""
        rows = list(rows)
        return RowState(*(tuple(field[row] for row in rows) for field in self.fields))

    def with_row(self, row: int, numbers: Sequence[int]) -> "RowState":
        """Other numbers, one for each field, in one row."""
        return RowState(
            *(old[:row] + (new,) + old[row + 1 :] for old, new in zip(self.fields, numbers, strict=True)),
        )

    def lengths_before(self, input_pos: int, batch_size: int, rows: Sequence[int] | None) -> tuple[int, ...]:
        """Lengths of all rows as a call for `batch_size` of them finds them. Arguments as for `KVCache.plan`.

        Raises:
            ValueError: if there are no such rows, or they are at another position.
        """
        lengths, in_use = self.lengths, len(self.lengths)
        if rows is not None and not (
            1 <= batch_size == len(rows) == len(set(rows)) and all(0 <= row < in_use for row in rows)
        ):
            raise ValueError(f"rows {list(rows)} do not name {batch_size} different ones of the {in_use} rows in use")
        if rows is None and not in_use:
            raise ValueError(f"input_pos={input_pos}, but the next token's position is 0: the cache is empty")
        if rows is None and batch_size != in_use:
            raise ValueError(f"batch size {batch_size} differs from {in_use}, set by the prefill")
        named = range(in_use) if rows is None else rows
        if input_pos == 0:
            lengths = tuple(0 if row in named else length for row, length in enumerate(lengths))
        expected = max(lengths[row] for row in named)
        if input_pos != expected:
            raise ValueError(f"input_pos={input_pos}, but the next token's position is {expected}")
        return lengths
