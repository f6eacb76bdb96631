"""Makes stdin, stdout and stderr safe for commands: always open, and without encoding errors."""

import errno
import io
import os
import re
import sys
from contextlib import suppress
from typing import Any

_LOSSY = ("strict", "surrogateescape")  # ways to encode that fail for some characters


class ClosedStream(io.TextIOBase):
    """Replaces a stream that the process was started without (`<&-`, `>&-`): using it is an `OSError`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, f"{self._name} is closed")

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        raise OSError(errno.EBADF, f"{self._name} is closed")


def prepare_standard_streams() -> None:
    """Has characters that stdout cannot encode, and bytes of stdin that cannot be decoded, replaced. Also occupies the
    descriptor of a closed stream, which a file that is opened later would get, with all output for that stream."""
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
    """Opens the null device under this descriptor, unless it is in use."""
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


def drop_unwritten() -> None:
    """Discards unwritten output of a failing stream, which the interpreter would try to write again when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_text(value: Any) -> bool:
    """Whether all texts in a value, a list or a mapping can be encoded as UTF-8. Command-line arguments that are not UTF-8
    have lone surrogates in place of their bytes."""
    if isinstance(value, dict):
        return all(is_text(key) and is_text(x) for key, x in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_text, value))
    return not isinstance(value, str) or not any("\ud800" <= c <= "\udfff" for c in value)


def check_text(name: str, text: str) -> None:
    """Raises `ValueError` if a text has a lone surrogate, or one that replaces a byte that is not UTF-8."""
    if found := re.search("[\ud800-\udfff]", text):
        place = f"at character {found.start() + 1}"
        if "\udc80" <= found[0] <= "\udcff":
            raise ValueError(f"{name} is not UTF-8 {place}: byte 0x{ord(found[0]) - 0xDC00:02x}")
        raise ValueError(f"{name} has half of a surrogate pair {place}: \\u{ord(found[0]):04x}")


def replace_surrogates(text: str) -> str:
    """The text with replacement characters for lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
