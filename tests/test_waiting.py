import io
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
from until import until

from litgpt import waiting as module
from litgpt.waiting import report_progress, tell, waiting


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def terminal(request, monkeypatch):
    class Err(io.StringIO):
        def isatty(self):
            return request.param

    monkeypatch.setattr(module, "SHOWN_AFTER", 0.01)
    monkeypatch.setattr(module, "LOGGED_AFTER", 0.05)
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=Err()))
    return module.sys.stderr


def test_a_bar_shows_how_far_the_innermost_block_is(terminal):
    with waiting("Outer"), waiting("Loading tiny", log=True):
        report_progress(3, 4)
        until(lambda: "Loading tiny" in terminal.getvalue())
    err = terminal.getvalue()
    if terminal.isatty():
        assert re.search(r"Loading tiny \[##################------\] 75% \(\d+ s\)", err)
        assert err.endswith("\r\x1b[K")  # nothing stays
    else:
        assert err == "Loading tiny ...\n"


def test_what_is_over_soon_needs_no_word(terminal, monkeypatch):
    monkeypatch.setattr(module, "SHOWN_AFTER", 100)
    monkeypatch.setattr(module, "LOGGED_AFTER", 100)
    with waiting("Loading", log=True):
        report_progress(1, 0)
    report_progress(1, 2)
    assert terminal.getvalue() == ""


def test_lines_that_are_told_stay(terminal):
    with waiting("Loading", log=True):
        until(lambda: "Loading" in terminal.getvalue())
        tell("one")
    assert ("\r\x1b[Kone\n" if terminal.isatty() else "\none\n") in terminal.getvalue()


def test_the_end_of_a_block_is_reached_after_an_error(terminal):
    with pytest.raises(KeyError), waiting("Loading"):
        raise KeyError
    tell("after")
    assert terminal.getvalue().endswith("after\n")
    assert not module._open


def test_waits_are_told_at_a_terminal_and_leave_nothing():
    code = (
        "from litgpt.waiting import waiting, tell\n"
        "with waiting('Outside'):\n"
        "    input()\n"
        "    with waiting(lambda: 'Inside ' + 'x' * 200): input()\n"
        "    tell('a line')\n"
    )
    terminal, other = pty.openpty()
    shown = ""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=other, text=True) as process:
        os.close(other)
        for seen in ("Outside", "Inside"):
            while f"{seen} " not in shown:
                shown += os.read(terminal, 65536).decode()
            process.stdin.write("\n")
            process.stdin.flush()
        with suppress(OSError):  # that nobody writes any more
            while more := os.read(terminal, 65536):
                shown += more.decode()
    os.close(terminal)
    assert process.returncode == 0
    assert re.search(r"\r\| Outside \(\d+ s\)", shown)
    assert "Inside xxx" in shown
    assert "\r\x1b[Ka line\r\n" in shown
    assert shown.endswith("\r\x1b[K")
    assert max(len(frame) for frame in shown.replace("\x1b[K", "").split("\r")) < 100
    silent = subprocess.run([sys.executable, "-c", code], input=b"\n\n", stderr=subprocess.PIPE, check=True)
    assert silent.stderr == b"a line\n"
