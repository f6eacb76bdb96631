"""Log-probabilities of right answers after a context that one of our caches has compressed."""

import json
from pathlib import Path

import torch
from timing import read_job, report

from litgpt.api import LLM
from litgpt.kvcache import CacheSpec

TAIL = 256  # slots for question and answer, so that nothing more goes


def main() -> None:
    job = read_job()
    llm = LLM.load(job["checkpoint"], precision="bf16-true")
    samples, found = json.loads(Path(job["samples"]).read_text(encoding="utf-8")), []
    for name, args in job["kinds"]:
        for removed in [0.0] if name == "dense" else job["removed"]:
            logprobs: dict[str, list[float]] = {}
            for sample in samples:
                session = llm.session(spec_for(name, args, removed, len(sample["context"])))
                session.extend(sample["context"])
                for question, right in sample["queries"]:
                    one = session.fork()
                    one.extend(question or right[:1])
                    rest = right if question else right[1:]
                    chosen = one.predict(rest).float().log_softmax(-1).gather(1, torch.tensor(rest)[:, None])
                    logprobs.setdefault(sample["kind"], []).append(chosen.mean().item())
            found.append({"cache": name, "removed": removed, "logprobs": logprobs})
    report(found)


def spec_for(name: str, args: dict, removed: float, length: int) -> CacheSpec:
    """The cache that keeps as many of `length` tokens as kvpress does, and has room for what follows."""
    kept = int(length * (1 - removed))
    if name == "dense":
        return CacheSpec("dense", cache_length=length + TAIL)
    if name == "lastrec":
        return CacheSpec(name, cache_length=kept, **args)
    tail = min(TAIL, length - kept - 8)  # all slots are fewer than the context's tokens, or none of them would go
    return CacheSpec(name, cache_length=kept + tail, tail=tail, **args)


if __name__ == "__main__":
    main()
