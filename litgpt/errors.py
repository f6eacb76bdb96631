"""Errors as messages for users of the program."""

import os
import re
import traceback
from pathlib import Path

USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError, IndexError, MemoryError)
"""Errors of bad input or a machine's limits; any other exception is a defect of the program."""


class UsageError(ValueError):
    """The command line itself is wrong."""


_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Unable to allocate", re.IGNORECASE)


def debugging() -> bool:
    """Whether `LITGPT_DEBUG=1` asks for tracebacks."""
    return os.environ.get("LITGPT_DEBUG", "0") not in ("", "0")


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an error on one line of at most so many characters, or its type where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def describe(error: BaseException) -> str:
    """An error as one line for the user."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return _describe_out_of_memory(text)
    if isinstance(error, FileExistsError) and error.filename is not None and not Path(error.filename).is_dir():
        return f"{str(error.filename)!r} is a file, and a folder is needed: give another name"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {str(error.filename)!r}" if error.filename is not None else "")
    frames = traceback.extract_tb(error.__traceback__)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = bool(modules) and modules[-1].partition(".")[0] in ("litgpt", "__main__")
    if not isinstance(error, USER_ERRORS):
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        return f"internal error: {type(error).__name__}: {text}{place} (LITGPT_DEBUG=1 shows the traceback)"
    if text and ours:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (LITGPT_DEBUG=1 shows where)"


def _describe_out_of_memory(text: str) -> str:
    size = ""
    if asked := re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text):
        size = f" ({asked[2] or f'{int(asked[1]) / 1e9:.1f} GB'} more were asked for)"
    return (
        f"out of memory{size}: take a smaller model, --quantize int8 or int4, a shorter prompt, a smaller --cache_length "
        "or fewer sequences at once"
    )
