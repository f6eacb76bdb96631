import io
import os
import pty
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

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
        time.sleep(0.2)
    err = terminal.getvalue()
    if terminal.isatty():
        assert "Loading tiny [##################------] 75% (0 s)" in err
        assert err.endswith("\r\x1b[K")  # nothing stays
    else:
        assert err == "Loading tiny ...\n"


def test_what_is_over_soon_needs_no_word(terminal, monkeypatch):
    monkeypatch.setattr(module, "SHOWN_AFTER", 5)
    monkeypatch.setattr(module, "LOGGED_AFTER", 5)
    with waiting("Loading", log=True):
        report_progress(1, 0)
    report_progress(1, 2)
    assert terminal.getvalue() == ""


def test_lines_that_are_told_stay(terminal):
    with waiting("Loading", log=True):
        tell("one")
    assert terminal.getvalue().endswith("one\n")


def test_the_end_of_a_block_is_reached_after_an_error(terminal):
    with pytest.raises(KeyError), waiting("Loading"):
        raise KeyError
    tell("after")
    assert terminal.getvalue().endswith("after\n")
    assert not module._open


def test_waits_are_told_at_a_terminal_and_leave_nothing():
    code = (
        "import time; from litgpt.waiting import waiting, tell\n"
        "with waiting('Outside'):\n"
        "    time.sleep(0.5)\n"
        "    with waiting(lambda: 'Inside ' + 'x' * 200): time.sleep(0.6)\n"
        "    tell('a line'); time.sleep(0.3)\n"
    )
    terminal, other = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=other, check=True)
    os.close(other)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "| Outside (0 s)" in shown
    assert "Inside xxx" in shown
    assert max(len(frame) for frame in shown.replace("\x1b[K", "").split("\r")) < 100
    assert "\r\x1b[Ka line\r\n" in shown
    assert shown.endswith("\r\x1b[K")
    silent = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True)
    assert silent.stderr == b"a line\n"
