"""The results as a table: a row for every cache at a budget and a length."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from litgpt.comparison.asking import INSIDE, OUTSIDE, SECOND
from litgpt.comparison.figure import Figure
from litgpt.comparison.records import Record
from litgpt.kvcache.memory import as_text
from litgpt.tasks.ruler import RULER


@dataclass
class Row:
    """The results of a cache at a budget and a length.

    Attributes:
        records: by task.
    """

    cache: str
    budget: float
    length: int
    records: dict[str, Record] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the caches, measured if the speed was."""
        return self.get("bytes", "speed") or self.get("bytes")

    def get(self, name: str, *tasks: str) -> Any:
        """An entry of the first of these tasks' records that has it (no tasks: of all)."""
        found = (record for task, record in self.records.items() if not tasks or task in tasks)
        return next((record[name] for record in found if record.get(name) is not None), None)

    def figure(self, name: str, *tasks: str) -> Figure | None:
        """A figure of these tasks; a score is the mean over all their samples."""
        found = [self.records[task]["figures"].get(name) for task in tasks if task in self.records]
        found = [Figure(*figure) for figure in found if figure is not None]
        if len(found) <= 1:
            return found[0] if found else None
        where, _, what = name.partition("_")
        replies = [reply for task in tasks if task in self.records for reply in self.records[task]["replies"]]
        values = [reply[what] for reply in replies if reply["question"] == where and reply[what] is not None]
        return Figure.share(values) if what == "score" else Figure.mean(values)


def rows_of(records: Iterable[Record]) -> list[Row]:
    """One row for each cache, budget and length, in the order of the records."""
    rows: dict[tuple, Row] = {}
    for record in records:
        place = record["cache"], record["budget"], record["length"]
        rows.setdefault(place, Row(*place)).records[record["task"]] = record
    return sorted(rows.values(), key=lambda row: row.length)


N_NAMING = 3  # first columns: the cache, its budget, and the length

Column = tuple[str, str, list[Any]]
"""Name for programs, heading for people, and a value for each row: text, a number, a `Figure` or None."""


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that have a value in any row."""
    asked = [
        (f"{name}_{where}_{what}", f"{heading} {where}{ending}", f"{where}_{what}", tasks)
        for name, heading, tasks in (("retrieval", "retrieval", ("retrieval",)), ("ruler", "RULER", tuple(RULER)))
        for where in (INSIDE, OUTSIDE, SECOND)
        for what, ending in (("score", ""), ("logprob", ", log-prob."), ("retention", ", held"))
    ]
    columns = [
        ("cache", "cache", [row.cache for row in rows]),
        ("budget", "budget", [row.budget for row in rows]),
        ("length", "length", [row.length for row in rows]),
        ("slots", "slots", [row.get("slots") for row in rows]),
        ("bytes", "bytes", [row.bytes for row in rows]),
        ("share_of_dense", "of dense", [row.bytes / row.get("dense_bytes") for row in rows]),
        *(
            (name, heading, [row.figure(name, "perplexity") for row in rows])
            for name, heading in (
                ("perplexity", "perplexity"),
                ("perplexity_ratio", "of dense's"),
                ("kl", "KL"),
                ("kl_99", "KL, 99 %"),
                ("same_top", "same top"),
            )
        ),
        *((name, heading, [row.figure(figure, *tasks) for row in rows]) for name, heading, figure, tasks in asked),
        *(
            (name, heading, [row.get(name) for row in rows])
            for name, heading in (
                ("prefill_tokens_per_second", "prefill tok/s"),
                ("decode_tokens_per_second", "decode tok/s"),
                ("peak_bytes", "peak memory"),
            )
        ),
    ]
    return _filled(columns)


def columns_by_task(rows: Sequence[Row]) -> list[Column]:
    """The scores of RULER's tasks one by one, after the columns that name a row; nothing if there are fewer than two tasks."""
    scores = [
        (f"{task}_{where}_score", f"{task} {where}", [row.figure(f"{where}_score", task) for row in rows])
        for task in RULER
        for where in (INSIDE, OUTSIDE, SECOND)
    ]
    if len({task for row in rows for task in row.records if task in RULER}) < 2:
        return []
    return [*columns_of(rows)[:N_NAMING], *_filled(scores)]


def all_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns for programs."""
    return [*columns_of(rows), *columns_by_task(rows)[N_NAMING:]]


def _filled(columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if any(value is not None for value in column[2])]


def shown(name: str, value: Any, interval: bool = True) -> str:
    """A value of the column `name`, as people read it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Figure):
        text = _number(value.value)
        return (
            f"{text} ({_number(value.low)} to {_number(value.high)})" if interval and value.low != value.high else text
        )
    if name in ("bytes", "peak_bytes"):
        return as_text(value)
    if name in ("budget", "share_of_dense"):
        return f"{value:.3g}"
    return f"{value:,.0f}" if name != "decode_tokens_per_second" else f"{value:,.1f}"


def _number(value: float) -> str:
    if abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def markdown(columns: Sequence[Column]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(heading for _, heading, _ in columns) + " |", "|" + "---|" * len(columns)]
    for i in range(len(columns[0][2])):
        cells = [shown(name, values[i]).replace("|", "\\|") for name, _, values in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """All results as CSV; a figure has two more columns for its interval."""
    columns = all_columns(rows)
    header, table = [], [[] for _ in rows]
    for name, _, values in columns:
        figures = any(isinstance(value, Figure) for value in values)
        header += [name, f"{name}_low", f"{name}_high"] if figures else [name]
        for line, value in zip(table, values, strict=True):
            line += (value or (None, None, None)) if figures else [value]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *table])
    return file.getvalue()
