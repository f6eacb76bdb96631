"""Writes the results: a table in the terminal, and files in a folder."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt.atomic_file import replacing
from litgpt.comparison.figure import Figure
from litgpt.comparison.page import html_page
from litgpt.comparison.table import N_NAMING, Row, all_columns, columns_by_task, columns_of, csv_text, markdown, shown

_TABLES = {
    "memory and speed": ("slots", "bytes", "share_of_dense", "prefill_", "decode_", "peak_"),
    "text": ("perplexity", "kl", "same_top"),
    "scores by where the question stands": ("score",),
    "the right answer: its mean log-probability, and the share of the needle that is held": ("logprob", "retention"),
}
"""What is shown together in a terminal: a heading, and how the names of its columns begin or end."""


def write_files(rows: Sequence[Row], folder: Path, title: str, about: str) -> list[Path]:
    """Write the table as Markdown and CSV, and the page with plots. Returns the files."""
    tables = [markdown(columns) for columns in (columns_of(rows), columns_by_task(rows)) if columns]
    contents = {
        "table.md": "\n".join([f"# {title}\n\n{about}\n", *tables]),
        "table.csv": csv_text(rows),
        "report.html": html_page(rows, title, about),
    }
    for name, text in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in contents]


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the results, in tables narrow enough for a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns = columns_of(rows)
    console = Console(width=None if sys.stdout.isatty() else 160)
    first = columns[:N_NAMING]
    for heading, names in _TABLES.items():
        shown_here = [column for column in columns if column[0].startswith(names) or column[0].endswith(names)]
        if not shown_here:
            continue
        table = Table(box=None, pad_edge=False)
        for name, head, _ in (*first, *shown_here):
            table.add_column(head, justify="left" if name == "cache" else "right", no_wrap=name == "cache")
        for i in range(len(rows)):
            table.add_row(*(escape(_cell(name, values[i])) for name, _, values in (*first, *shown_here)))
        console.print(escape(f"{title}: {heading}"), table, "", sep="\n", highlight=False)


def _cell(name: str, value: Any) -> str:
    """A value, with its interval or, if it is in the middle of that, half the width."""
    text = shown(name, value, interval=False)
    if not isinstance(value, Figure) or value.low == value.high:
        return text
    half = (value.high - value.low) / 2
    even = abs(value.high + value.low - 2 * value.value) < 0.1 * half
    return text + (f" \u00b1{half:.2g}" if even else f" ({value.low:.2f} to {value.high:.2f})")


def print_json(rows: Sequence[Row]) -> None:
    """Print a JSON object for every row, with [value, low, high] for figures."""
    columns = all_columns(rows)
    for i in range(len(rows)):
        print(json.dumps({name: values[i] for name, _, values in columns}))
