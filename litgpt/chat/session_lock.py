"""One chat at a time goes on with a session's file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other chats from a session's file, by a lock beside it that the system releases when the process ends, however.

    Raises:
        ValueError: if another chat has it.
        OSError: if files cannot be made there.
    """
    from filelock import FileLock, Timeout  # takes a tenth of a second, which others do not wait for

    real = Path(os.path.realpath(path))
    file = real.with_name(f".{real.name[:200]}.lock")
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # what is in the way is no other chat's lock
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another chat goes on with {path}, and would overwrite what this one saves: leave it, or name another file"
        ) from None
    try:
        yield
    finally:
        lock.release()
