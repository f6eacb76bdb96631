"""Shows on stderr how far a conversion is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def weights_progress(title: str, total_bytes: int, names: bool = False) -> Iterator[Callable[[str, int], None]]:
    """Gives a function to call with the name and the bytes of every weight that is done.

    Shows a bar if stderr is a terminal, or, with `names`, a line for every weight.
    """
    if names:
        yield lambda name, size: print(f"{name} ({size:,} bytes)", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda name, size: progress.advance(task, size)
