"""What all workers share: the job, the clock, the memory, the answer. Runs in every interpreter, so it imports the standard library only."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read_job() -> dict:
    """What is to be measured, from the command line."""
    return json.loads(sys.argv[1])


def read_tokens(job: dict, count: int) -> list[int]:
    """The first `count` tokens of the text, over and over again if it is shorter."""
    tokens = json.loads(Path(job["tokens"]).read_text(encoding="utf-8"))
    return (tokens * -(-count // len(tokens)))[:count]


def peak_bytes() -> int:
    """Most memory that this process had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(job: dict, imported: int, threads: int, generate: Callable[[], Iterator[int]]) -> dict:
    """Runs `generate` once to warm up and once by the clock.

    Args:
        job: with `context` and `new_tokens`.
        imported: `peak_bytes()` before the model was loaded.
        threads: that the computations use.
        generate: prefills the context and yields 1 + `new_tokens` tokens: the first one comes with the prefill.

    Returns:
        Tokens per second of prefill and decode, bytes of memory, the threads and the tokens.
    """
    for _ in generate():
        pass
    tokens, times, started = [], [], time.perf_counter()
    for token in generate():
        times.append(time.perf_counter())
        tokens.append(token)
    if len(tokens) != job["new_tokens"] + 1:
        raise RuntimeError(f"{len(tokens)} tokens were generated, not {job['new_tokens'] + 1}")
    return {
        "prefill": job["context"] / (times[0] - started),
        "decode": job["new_tokens"] / (times[-1] - times[0]),
        "peak_bytes": peak_bytes(),
        "peak_above_import": peak_bytes() - imported,
        "threads": threads,
        "answer": tokens,
    }


def torch_instructions(torch: Any) -> str:
    """The instruction set of torch's own operations, and the limit of those of oneDNN, if it has one."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"torch for {torch.backends.cpu.get_cpu_capability()}" + (f", oneDNN for {limit} at most" if limit else "")


def report(result: dict) -> None:
    """Hands the result over: one line of JSON, the last one on stdout."""
    print(json.dumps(result))
