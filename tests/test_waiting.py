import os
import pty
import subprocess
import sys


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
