"""Time to first token of the command: how long somebody waits who types `litgpt generate`."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environments import Launcher, last_lines

QUESTION = "What is the capital of France?"
# Words of which an answer has one early, however it begins. LitGPT prints the question before, which has one too.
ANSWER = re.compile(rb"(?<!What is the )capital|Paris", re.IGNORECASE)


def seconds_to_answer(launcher: Launcher, python: Path, checkpoint: Path) -> float:
    """Seconds from starting `litgpt generate` until the beginning of the default model's answer is on stdout.

    Raises `RuntimeError` if it fails or answers something else.
    """
    command = [str(python), "-m", "litgpt", "generate", str(checkpoint), "--prompt", QUESTION]
    command += ["--temperature", "0", "--precision", "bf16-true"]
    env = launcher.environment(own=python == Path(sys.executable))
    with tempfile.TemporaryFile() as messages:
        started, elapsed, seen = time.perf_counter(), None, b""
        with subprocess.Popen(command, env=env, cwd=launcher.work_dir, stdout=subprocess.PIPE, stderr=messages) as run:
            while block := os.read(run.stdout.fileno(), 1 << 16):
                seen += block
                if elapsed is None and ANSWER.search(seen):
                    elapsed = time.perf_counter() - started
        if elapsed is None:
            messages.seek(0)
            found = last_lines(seen.decode(errors="replace") + messages.read().decode(errors="replace"))
            raise RuntimeError(f"{python} -m litgpt generate did not answer {QUESTION!r}:\n{found}")
    return elapsed
