"""Waiting for what other threads and processes do: for the thing itself, never for a time in which it should have happened."""

import time
from collections.abc import Callable

LIMIT = 100  # seconds, of which only a test that fails needs more than a few


def until(condition: Callable[[], object]) -> None:
    """Return once `condition` is true."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
