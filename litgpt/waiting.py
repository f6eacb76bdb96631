"""Waits of some seconds inside the library, which front ends show in their own way."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

log = logging.getLogger("litgpt")


@contextmanager
def logged(message: str) -> Iterator[None]:
    """Logs what goes on: one line, on stderr unless a program has its own handlers."""
    log.warning(message)
    yield


@contextmanager
def spinner(message: str) -> Iterator[None]:
    """A spinner on stderr if that is a terminal, else as `logged`."""
    if not sys.stderr.isatty():
        with logged(message):
            yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(message, total=None)
        yield


_show: Callable[[str], AbstractContextManager[None]] = logged


def show_waits(show: Callable[[str], AbstractContextManager[None]]) -> None:
    """Have `show(message)` entered at the start of every wait and left at its end."""
    global _show
    _show = show


def waiting(message: str) -> AbstractContextManager[None]:
    """Around what takes a while: `message` says what goes on."""
    return _show(message)
