import os
import pty
import re
import select
import signal
import stat
import sys
import time

import pytest
from prompt_toolkit.history import InMemoryHistory

from litgpt.chat.messages import _history, history_path, read_messages, split_command
from litgpt.engine.session_file import read_session


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/reset", ("/reset", "")),
        ("/exit", ("/exit", "")),
        ("exit", ("/exit", "")),
        ("/system", ("/system", "")),
        ("/system Be  brief.", ("/system", "Be  brief.")),
        ("/system /reset", ("/system", "/reset")),
        ("/system/etc/fstab is what?", (None, "/system/etc/fstab is what?")),
        ("/systemd", (None, "/systemd")),
        ("/resetting", (None, "/resetting")),
        ("/exitcode", (None, "/exitcode")),
        ("/exit: what is it?", (None, "/exit: what is it?")),
        ("/usr/bin", (None, "/usr/bin")),
        ("/", (None, "/")),
        ("exit the room", (None, "exit the room")),
        ("", (None, "")),
    ],
)
def test_a_command_is_its_word_alone_or_followed_by_a_space(message, expected):
    assert split_command(message) == expected


def messages(*lines, multiline=False):
    """The messages that come of lines; a type is raised in the place of one."""
    given, interrupts = iter(lines), []

    def read(prompt):
        line = next(given, EOFError)
        if isinstance(line, type):
            raise line
        return line

    return list(read_messages(read, multiline, lambda: interrupts.append(1))), len(interrupts)


def test_messages_are_lines():
    assert messages(" a ", "b\nc", KeyboardInterrupt, "/x") == (["a", "b\nc", "/x"], 1)


def test_long_messages_end_with_a_line():
    lines = ["/reset", "a", "/exit", "!submit", "/usr", "b", " !submit ", "c\nd\n!submit", "e", KeyboardInterrupt, "f"]
    assert messages(*lines, multiline=True) == (["/reset", "a\n/exit", "/usr\nb", "c\nd", "f"], 1)


def test_what_is_not_text_is_replaced():
    assert messages("caf\udce9", "\ud800", "\ud83d\ude00 \U0001f600 ok")[0] == [
        "caf\ufffd",
        "\ufffd",
        "\U0001f600 \U0001f600 ok",
    ]


def test_the_history_may_be_elsewhere_or_nowhere(monkeypatch, tmp_path):
    monkeypatch.delenv("LITGPT_CHAT_HISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "litgpt" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "litgpt" / "chat_history"
    monkeypatch.setenv("LITGPT_CHAT_HISTORY", str(tmp_path / "h"))
    assert history_path() == tmp_path / "h"
    monkeypatch.setenv("LITGPT_CHAT_HISTORY", "")
    assert history_path() is None


def test_a_history_that_cannot_be_written_is_kept_in_memory(monkeypatch, tmp_path):
    (tmp_path / "history").write_bytes(b"\n+\xff\n")
    monkeypatch.setenv("LITGPT_CHAT_HISTORY", str(tmp_path / "history"))
    history = _history()
    assert list(history.load_history_strings()) == ["\ufffd"]
    history.store_string("caf\udce9")
    assert next(iter(history.load_history_strings())) == "caf\ufffd"
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600
    for path in ("/dev/null", "/proc/nowhere/history", str(tmp_path)):
        monkeypatch.setenv("LITGPT_CHAT_HISTORY", path)
        assert isinstance(_history(), InMemoryHistory)


# --- at a terminal


class Terminal:
    """`litgpt chat` at a terminal of its own."""

    def __init__(self, *args, **environment):
        self.shown = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(environment, OMP_NUM_THREADS="1", TERM="xterm", COLUMNS="80", LINES="24")
            os.execv(sys.executable, [sys.executable, "-m", "litgpt", "chat", *args, "--precision", "32-true"])

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def wait_for(self, pattern, seconds=60):
        """Read what is shown until it has the pattern, and forget it up to there."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            try:
                assert ready, f"no {pattern!r} in {self.shown!r}"
                data = os.read(self.fd, 65536)
            except OSError:
                data = b""
            assert data, f"the end came before {pattern!r}: {self.shown!r}"
            self.shown += data.decode(errors="replace")
        self.shown = self.shown[match.end() :]
        return match

    def end(self):
        """The exit code."""
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


PASTE = "\x1b[200~{}\x1b[201~"
UP, CTRL_A, CTRL_C, CTRL_D, ENTER, ALT_ENTER, BACKSPACE = "\x1b[A", "\x01", "\x03", "\x04", "\r", "\x1b\r", "\x7f"


def test_lines_are_edited_and_remembered(model, tmp_path):
    """Messages are what the session says, whatever keys made them."""
    history, session = tmp_path / "state" / "history", tmp_path / "s"
    args = (model, "--session", str(session), "--max_new_tokens", "3")
    chat = Terminal(*args, LITGPT_CHAT_HISTORY=str(history))
    for keys in (
        "ello" + CTRL_A + "H" + ENTER,
        UP + "!" + ENTER,
        "xy" + BACKSPACE * 5 + "z\n",
        PASTE.format("one\ntwo\n/exit") + " three" + ENTER,
        "a" + ALT_ENTER + "b" + ENTER,
        "long " * 60 + CTRL_A + "very " + ENTER,
    ):
        chat.wait_for(">>> ")
        chat.type(keys)
        chat.wait_for(r"\[stopped at 3 tokens: --max_new_tokens\]|\[\d tokens")
        chat.wait_for("computed before")
    chat.wait_for(">>> ")
    chat.type("given up" + CTRL_C)
    chat.wait_for("/exit leaves")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    chat.wait_for("Saved to")
    assert chat.end() == 0
    said = [m["content"] for m in read_session(session).about["notes"]["messages"] if m["role"] == "user"]
    assert said == ["Hello", "Hello!", "z", "one\ntwo\n/exit three", "a\nb", ("very " + "long " * 60).strip()]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "one\n+two\n+/exit three" in history.read_text()

    chat = Terminal(*args, LITGPT_CHAT_HISTORY=str(history))  # another day
    chat.wait_for(">>> ")
    chat.type(UP * 3 + ENTER)
    chat.wait_for("computed before")
    chat.type("/exit" + ENTER)
    assert chat.end() == 0
    said = [m["content"] for m in read_session(session).about["notes"]["messages"] if m["role"] == "user"]
    assert said[-1] == "a\nb"


def test_ctrl_c_at_a_terminal_ends_an_answer_only(model):
    chat = Terminal(model, "--max_new_tokens", "450", LITGPT_CHAT_HISTORY="")
    for _ in range(3):
        chat.wait_for(">>> ")
        chat.type("Hello" + ENTER)
        chat.wait_for("Hello")
        time.sleep(0.1)
        os.kill(chat.pid, signal.SIGINT)
        chat.wait_for(r"computed before|Interrupted|/exit leaves")
    chat.type("/reset" + ENTER)
    chat.wait_for("Everything is forgotten")
    chat.type("/exit" + ENTER)
    assert chat.end() == 0
