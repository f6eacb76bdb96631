"""Writes the results: a table in the terminal, and files in a folder."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt.atomic_file import replacing
from litgpt.comparison.figure import Figure
from litgpt.comparison.page import html_page
from litgpt.comparison.table import Row, columns_of, csv_text, markdown, shown

_FIRST = ("cache", "budget", "length")
_TABLES = {
    "memory and speed": ("slots", "bytes", "share_of_dense", "prefill_", "decode_", "peak_"),
    "text": ("perplexity", "kl", "same_top"),
    "retrieval": ("retrieval_",),
    "RULER": ("ruler_",),
}
"""What is shown together in a terminal: a heading, and how the names of its columns begin."""


def write_files(rows: Sequence[Row], folder: Path, title: str, about: str) -> list[Path]:
    """Write the table as Markdown and CSV, and the page with plots. Returns the files."""
    contents = {
        "table.md": f"# {title}\n\n{about}\n\n{markdown(rows)}",
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
    from rich.table import Table

    columns = columns_of(rows)
    console = Console(width=None if sys.stdout.isatty() else 160)
    first = [column for column in columns if column[0] in _FIRST]
    for heading, names in _TABLES.items():
        shown_here = [column for column in columns if column[0].startswith(names)]
        if not shown_here:
            continue
        table = Table(title=f"{title}: {heading}", title_justify="left", box=None, pad_edge=False)
        for name, head, _ in (*first, *shown_here):
            label = head.removeprefix(f"{heading} ")
            table.add_column(label, justify="left" if name == "cache" else "right", overflow="fold")
        for i in range(len(rows)):
            table.add_row(*(_cell(name, values[i]) for name, _, values in (*first, *shown_here)))
        console.print(table, "")


def _cell(name: str, value: Any) -> str:
    """A value, with half the width of its interval."""
    text = shown(name, value, interval=False)
    if isinstance(value, Figure) and value.low != value.high:
        text += f" \u00b1{(value.high - value.low) / 2:.2g}"
    return text


def print_json(rows: Sequence[Row]) -> None:
    """Print a JSON object for every row, with [value, low, high] for figures."""
    for i in range(len(rows)):
        print(json.dumps({name: values[i] for name, _, values in columns_of(rows)}))
