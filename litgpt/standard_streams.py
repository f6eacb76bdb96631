"""stdin, stdout and stderr as commands can rely on them: there, and never failing for a character."""

import errno
import io
import os
import re
import sys
from contextlib import suppress
from typing import Any

_LOSSY = ("strict", "surrogateescape")  # ways to encode that fail for some characters


class ClosedStream(io.TextIOBase):
    """Stands for a stream that the process was started without (`<&-`, `>&-`): using it is an `OSError`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, f"{self._name} is closed")

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        raise OSError(errno.EBADF, f"{self._name} is closed")


def prepare_standard_streams() -> None:
    """Have characters that stdout's encoding lacks, and bytes of stdin that mean nothing, replaced. A closed stream keeps
    its place, so that no file that is opened later gets the descriptor and with it what others write there."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                _occupy(descriptor)
            # without any stderr, messages would go to stdout
            setattr(sys, name, open(os.devnull, "w") if name == "stderr" else ClosedStream(name))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _LOSSY:
            stream.reconfigure(errors="replace")


def _occupy(descriptor: int) -> None:
    """Open nothing under this descriptor, unless it is in use."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


def drop_unwritten() -> None:
    """Forget what a failing stream could not write: the interpreter would try again when it ends, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_text(value: Any) -> bool:
    """Whether all characters in a value, or in what a list or a mapping holds, can be written as UTF-8. Arguments of a
    command line that are not UTF-8 come with lone surrogates in the place of their bytes."""
    if isinstance(value, dict):
        return all(is_text(key) and is_text(x) for key, x in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_text, value))
    return not isinstance(value, str) or not any("\ud800" <= c <= "\udfff" for c in value)


def check_text(name: str, text: str) -> None:
    """Raise `ValueError` if a text has what is no character: half of a surrogate pair, or bytes that are not UTF-8."""
    if found := re.search("[\ud800-\udfff]", text):
        place = f"at character {found.start() + 1}"
        if "\udc80" <= found[0] <= "\udcff":
            raise ValueError(f"{name} is not UTF-8 {place}: byte 0x{ord(found[0]) - 0xDC00:02x}")
        raise ValueError(f"{name} has half of a surrogate pair {place}: \\u{ord(found[0]):04x}")


def replace_surrogates(text: str) -> str:
    """The text with replacement characters for lone surrogates, which mean nothing."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
