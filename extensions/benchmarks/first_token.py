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
# What an answer begins with is not asked: the first words of the default model are a near tie. LitGPT prints the prompt before.
ANSWER = re.compile(rb"\w")
ANSWER_AFTER_PROMPT = re.compile(rb"France\?\s*(?:assistant\s*)?(?!assistant)\w")


def seconds_to_answer(launcher: Launcher, python: Path, checkpoint: Path) -> float:
    """Seconds from starting `litgpt generate` until the beginning of an answer is on stdout.

    Raises `RuntimeError` if it fails or answers nothing.
    """
    command = [str(python), "-m", "litgpt", "generate", str(checkpoint), "--prompt", QUESTION]
    command += ["--temperature", "0", "--precision", "bf16-true"]
    own = python == Path(sys.executable)
    env, answer = launcher.environment(own), ANSWER if own else ANSWER_AFTER_PROMPT
    with tempfile.TemporaryFile() as messages:
        started, elapsed, seen = time.perf_counter(), None, b""
        with subprocess.Popen(command, env=env, cwd=launcher.work_dir, stdout=subprocess.PIPE, stderr=messages) as run:
            while block := os.read(run.stdout.fileno(), 1 << 16):
                seen += block
                if elapsed is None and answer.search(seen):
                    elapsed = time.perf_counter() - started
        if elapsed is None or run.returncode:
            messages.seek(0)
            found = last_lines(seen.decode(errors="replace") + messages.read().decode(errors="replace"))
            raise RuntimeError(f"{python} -m litgpt generate did not answer {QUESTION!r}:\n{found}")
    return elapsed
