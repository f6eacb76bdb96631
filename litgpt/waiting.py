"""Shows on the terminal what the program is doing while it takes long."""

import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SHOWN_AFTER = 0.3  # seconds
LOGGED_AFTER = 2.0  # seconds, where stderr is no terminal
_BAR = 24


class _Block:
    """A block of the program that takes time."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.progress: tuple[int, int] | None = None


_open: list[_Block] = []  # the innermost one, which is shown, last


@contextmanager
def waiting(text: str | Callable[[], str], log: bool = False) -> Iterator[None]:
    """Shows, while the block runs and if stderr is a terminal, a text with a spinner, the seconds so far, and a bar once
    `report_progress` was called. Blocks may be nested; print lines inside with `tell`.

    Args:
        text: The activity, such as "Loading"; or a function that gives it, called repeatedly by another thread.
        log: Where stderr is no terminal, print the text as a line once the block takes longer than two seconds.
    """
    show = _show if sys.stderr.isatty() else _log
    if show is _log and not log:
        yield
        return
    block = _Block()
    say = (lambda: text) if isinstance(text, str) else text
    thread = threading.Thread(target=show, args=(say, block), daemon=True)
    try:
        _open.append(block)
        thread.start()
        yield
    finally:
        block.over.set()
        _open[:] = [other for other in _open if other is not block]
        if thread.ident is not None:
            thread.join()


def report_progress(done: int, total: int) -> None:
    """Sets the progress of the innermost block, in any unit."""
    if _open:
        _open[-1].progress = (done, total)


def tell(line: str) -> None:
    """Prints a line to stderr, also inside of `waiting`; nothing if stderr is closed."""
    _write(f"\r\x1b[K{line}\n" if _open and sys.stderr.isatty() else f"{line}\n")


class WarningsOnStderr(logging.Handler):
    """Prints the library's log records on stderr, one a line."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


stderr_log = WarningsOnStderr()  # for front ends to add to the logger "litgpt"


def _log(say: Callable[[], str], block: _Block) -> None:
    if not block.over.wait(LOGGED_AFTER):
        _write(f"{say()} ...\n")


def _show(say: Callable[[], str], block: _Block) -> None:
    started = time.monotonic()
    if block.over.wait(SHOWN_AFTER):
        return
    for mark in itertools.cycle("|/-\\"):
        if _open[-1:] == [block]:
            line = f"{mark} {say()}{_bar(block.progress)} ({time.monotonic() - started:.0f} s)"
            _write(f"\r{line[: _columns() - 1]}\x1b[K")  # a line that wraps could not be taken back
        if block.over.wait(0.1):
            break
    _write("\r\x1b[K")


def _bar(progress: tuple[int, int] | None) -> str:
    if progress is None or not progress[1]:
        return ""
    part = min(progress) / progress[1]
    return f" [{'#' * int(_BAR * part):-<{_BAR}}] {part:.0%}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # closed meanwhile
        sys.stderr.write(text)
        sys.stderr.flush()
