"""A lock that lets only one chat at a time use a session's file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a session's file against other chats, by a file beside it; the system releases the lock when the process ends.

    Raises:
        ValueError: if another chat holds the lock.
        OSError: if the lock file cannot be created.
    """
    from filelock import FileLock, Timeout  # a slow import

    real = Path(os.path.realpath(path))
    file = real.with_name(f".{real.name[:200]}.lock")
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # errors here do not mean that another chat holds the lock
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another chat has {path} open, and would overwrite this one: exit that chat, or name another file"
        ) from None
    try:
        yield
    finally:
        lock.release()
