"""Handling of Ctrl-C at any time without inconsistent state."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

Mode = Literal["note", "stop", "raise"]


class CtrlC:
    """While handled, the effect of Ctrl-C depends on the mode.

    note: sets `pressed`.
    stop: the first one sets `pressed`; the second one raises `KeyboardInterrupt`.
    raise: raises `KeyboardInterrupt`, once; the mode is then "note", so that cleaning up is not interrupted.
    """

    def __init__(self) -> None:
        self.mode: Mode = "note"
        self.pressed = False

    @contextmanager
    def handled(self) -> Iterator["CtrlC"]:
        """Handle SIGINT, in the main thread; other threads get no signals."""
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
