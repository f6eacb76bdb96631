"""Ctrl-C, which may come at any time, and must not leave anything half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

Mode = Literal["note", "stop", "raise"]


class CtrlC:
    """While it is entered, Ctrl-C does what its mode says.

    note: it is noted in `pressed`; no more.
    stop: the first one is noted; who does not stop on that is interrupted by the second one.
    raise: it raises `KeyboardInterrupt`, once: after that the mode is "note", so that tidying up is not interrupted too.
    """

    def __init__(self) -> None:
        self.mode: Mode = "note"
        self.pressed = False

    @contextmanager
    def handled(self) -> Iterator["CtrlC"]:
        """Handle SIGINT, in the main thread; in others signals never come."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextmanager
    def as_mode(self, mode: Mode) -> Iterator[None]:
        """Have a mode inside the block, and "note" after it."""
        self.pressed = False
        self.mode = mode
        try:
            yield
        finally:
            self.mode = "note"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.mode == "raise" or (self.mode == "stop" and self.pressed):
            self.mode = "note"
            raise KeyboardInterrupt
        self.pressed = True
