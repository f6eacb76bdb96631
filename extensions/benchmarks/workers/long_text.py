"""A text fed token by token through last-recent caches: speed by window of positions, and the caches' bytes."""

import time

import torch
from timing import read_job, read_tokens, report

from litgpt.engine.loading import choose_kv_caches, make_ready
from litgpt.engine.prefill import prefill
from litgpt.kvcache import CacheSpec
from litgpt.model import GPT


def main() -> None:
    job = read_job()
    model = make_ready(job["checkpoint"], "bf16-true", device=torch.device("cpu")).model
    choose_kv_caches(model, CacheSpec("lastrec", cache_length=job["slots"]))
    tokens = torch.tensor(read_tokens(job, job["text"]))
    report(measure_windows(model, tokens, job["slots"], job["start"], job["windows"]))


@torch.inference_mode()
def measure_windows(model: GPT, tokens: torch.Tensor, prompt: int, start: int, windows: int) -> dict:
    """Prefills `prompt` tokens, feeds the rest one by one, and times positions from `start` on in equal windows.

    Returns the windows' `edges`, their `speeds` in tokens per second, and the bytes of all caches at every edge: as they
    are `allocated`, as they say by `size_estimate` (`estimated`), and as was to be known before (`apriori`).
    """
    edges = [start + (len(tokens) - start) * i // windows for i in range(windows + 1)]
    marks, allocated, estimated = [], [], []
    prefill(model, [tokens[:prompt]])
    for position in range(prompt, len(tokens) + 1):
        if position in edges:
            marks.append(time.perf_counter())
            allocated.append(allocated_bytes(model))
            estimated.append(model.caches.size_in_bytes())
        if position < len(tokens):
            model(tokens[None, position : position + 1], position, last_token_only=True).argmax(-1).item()
    spans = zip(edges, edges[1:], marks, marks[1:], strict=False)
    return {
        "edges": edges,
        "speeds": [(stop - first) / (ended - began) for first, stop, began, ended in spans],
        "allocated": allocated,
        "estimated": estimated,
        "apriori": sum(cache.size_estimate_apriori(cache.get_params())[0] for cache in model.kv_caches()) // 8,
    }


def allocated_bytes(model: GPT) -> int:
    """Bytes of the memory behind all tensors that the caches hold."""
    storages = {
        buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes()
        for cache in model.kv_caches()
        for buffer in cache.buffers()
    }
    return sum(storages.values())


if __name__ == "__main__":
    main()
