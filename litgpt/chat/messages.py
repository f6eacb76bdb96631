"""Messages of the user: from a terminal, with editing and a history, or line by line from a pipe or a file."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from litgpt.standard_streams import replace_surrogates

if TYPE_CHECKING:
    from prompt_toolkit.history import History

COMMANDS = ("/exit", "/quit", "/reset", "/system", "/help")
END_OF_MESSAGE = "!submit"
HISTORY = "LITGPT_CHAT_HISTORY"  # environment variable: path of the history, or nothing for none

ReadLine = Callable[[str], str]
"""Shows a prompt and returns a line without its end; raises `EOFError` at the end of the input."""


def split_command(message: str) -> tuple[str | None, str]:
    """A message as a command and its text, or None and the message. A command is its word alone or followed by a space."""
    word, _, text = message.partition(" ")
    if message in ("exit", "quit"):
        return "/exit", ""
    return (word, text.strip()) if word in COMMANDS else (None, message)


def read_messages(read_line: ReadLine, multiline: bool, on_interrupt: Callable[[], None]) -> Iterator[str]:
    """Messages, stripped, until the input ends.

    Args:
        read_line: returns the next line, or several pasted ones.
        multiline: a message ends at a line with END_OF_MESSAGE; commands are lines of their own.
        on_interrupt: called after Ctrl-C, which discards the lines so far.
    """
    lines: list[str] = []
    while True:
        try:
            given = replace_surrogates(read_line("... " if lines else ">>> "))
        except EOFError:
            if lines:
                yield "\n".join(lines).strip()
            return
        except KeyboardInterrupt:
            lines.clear()
            on_interrupt()
            continue
        if not multiline or (not lines and split_command(given.strip())[0]):
            yield given.strip()
            continue
        for line in given.split("\n"):
            if line.strip() == END_OF_MESSAGE:
                yield "\n".join(lines).strip()
                lines.clear()
            else:
                lines.append(line)


def line_reader() -> ReadLine:
    """A reader of lines: with editing if stdin and stderr or stdout are terminals."""
    screen = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
    if sys.stdin.isatty() and screen is not None:
        return _editing_reader(screen)
    return _plain_reader()


def _plain_reader() -> ReadLine:
    started = False

    def read_line(prompt: str) -> str:
        nonlocal started
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = input()
        if not started:
            started, line = True, line.removeprefix("\ufeff")  # byte order mark
        return line

    return read_line


def _editing_reader(screen: TextIO) -> ReadLine:
    """A reader with editing: Enter sends, Alt-Enter begins a new line, a pasted text is one message."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def continuation(width: int, number: int, wrapped: int) -> str:
        return "" if wrapped else "... "  # none for wrapped lines

    output = create_output(screen)
    output.enable_cpr = False  # the cursor's position is not needed, and not every terminal reports it
    session: PromptSession[str] = PromptSession(
        history=_history(), key_bindings=keys, output=output, prompt_continuation=continuation, enable_suspend=True
    )
    return lambda prompt: session.prompt([("ansicyan", prompt)])


def history_path() -> Path | None:
    """File of the history (None: turned off, or there is no home folder)."""
    if HISTORY in os.environ:
        return Path(os.environ[HISTORY]) if os.environ[HISTORY] else None
    state = os.environ.get("XDG_STATE_HOME")
    with suppress(RuntimeError):  # no home
        return (Path(state) if state else Path.home() / ".local" / "state") / "litgpt" / "chat_history"
    return None


def _history() -> "History":
    """The history in a file that only its user may read; in memory if there is no file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class PrivateHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # e.g. a full disk: the message is not stored
                super().store_string(replace_surrogates(string))

    path = history_path()
    if path is not None and (path.is_file() or not path.exists()):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            os.close(descriptor)
            path.chmod(0o600)
            return PrivateHistory(str(path))
    return InMemoryHistory()
