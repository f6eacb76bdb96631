"""How fast a model is with a cache, and how much memory a sequence takes."""

import gc
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from litgpt.api import LLM
from litgpt.kvcache import CacheSpec
from litgpt.pages import release_freed_memory

DECODED = 32  # tokens, where no number is given
_PROCESS = Path("/proc/self")


def measure_speed(
    llm: LLM, spec: CacheSpec, tokens: Sequence[int], prompt_chunksize: int | None = None, decoded: int = DECODED
) -> dict[str, float | None]:
    """Tokens per second of a prefill of `tokens` and of `decoded` steps after it, bytes of the caches, and the peak of the memory
    that all of it took above the model with a RoPE table for as many positions, caches included (None where the system does not
    tell)."""
    warm_up = llm.session(spec, prompt_chunksize=prompt_chunksize)
    warm_up.extend(tokens[: min(len(tokens), 64)])
    list(warm_up.generate(max_new_tokens=2, temperature=0.0))
    del warm_up
    llm.model.rope_rows(0, min(len(tokens) + decoded, llm.model.config.block_size))
    before = _start_peak(llm.model.device)
    session = llm.session(spec, prompt_chunksize=prompt_chunksize)
    started = perf_counter()
    session.extend(tokens)
    _synchronize(llm.model.device)
    prefilled = perf_counter()
    n = sum(1 for _ in session.generate(max_new_tokens=decoded, temperature=0.0))
    ended = perf_counter()
    peak = _peak(llm.model.device)
    return {
        "prefill_tokens_per_second": (len(tokens) - 1) / (prefilled - started),
        "decode_tokens_per_second": n / (ended - prefilled),
        "bytes": session.cache_bytes,
        "peak_bytes": None if before is None or peak is None else peak - before,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int | None:
    """Begin to watch for the largest amount of memory in use. Returns the amount now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        release_freed_memory()  # it would hide what is taken next
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    """A figure of this process, in bytes."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
