"""A word on the terminal for everything that takes longer than people wait in silence."""

import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SHOWN_AFTER = 0.3  # seconds: what is over sooner needs no word

_open: list[threading.Event] = []  # of the blocks that the program is in, the innermost one last: that one is shown


@contextmanager
def waiting(text: str | Callable[[], str]) -> Iterator[None]:
    """Tell what goes on inside the block, if that takes long and stderr is a terminal: by a spinner with the seconds so far,
    which is gone afterwards. Blocks may be nested; what is printed meanwhile goes through `tell`.

    Args:
        text: what goes on, such as "Loading"; or a function that gives it, called again and again by another thread.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(text, done), daemon=True)
    try:
        _open.append(done)
        thread.start()
        yield
    finally:
        done.set()
        _open[:] = [other for other in _open if other is not done]
        if thread.ident is not None:
            thread.join()


def tell(line: str) -> None:
    """Print a line to stderr, also while something is waited for; it is lost if nobody can read it."""
    _write(f"\r\x1b[K{line}\n" if _open else f"{line}\n")


class WarningsOnStderr(logging.Handler):
    """Has what the library logs told on stderr, a line each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


stderr_log = WarningsOnStderr()  # for front ends to add to the logger "litgpt"


def _show(text: str | Callable[[], str], done: threading.Event) -> None:
    started = time.monotonic()
    say = (lambda: text) if isinstance(text, str) else text
    if done.wait(SHOWN_AFTER):
        return
    for mark in itertools.cycle("|/-\\"):
        if _open[-1:] == [done]:
            line = f"{mark} {say()} ({time.monotonic() - started:.0f} s)"
            _write(f"\r{line[: _columns() - 1]}\x1b[K")  # a line that wraps could not be taken back
        if done.wait(0.1):
            break
    _write("\r\x1b[K")


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # closed meanwhile
        sys.stderr.write(text)
        sys.stderr.flush()
