"""Log-probabilities of right answers after a context that one of our caches has compressed."""

import torch
from press_runs import Logprobs, each_run, queries_of
from timing import read_job, report

from litgpt.api import LLM
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.spec import PYRAMID

TAIL = 256  # slots for question and answer, so that nothing more goes


def main() -> None:
    job = read_job()
    llm = LLM.load(job["checkpoint"], precision="bf16-true")
    layers = sum(llm.config.window(i) is None for i in range(llm.config.n_layer))

    def run(cache: list, removed: float, samples: list[dict]) -> Logprobs:
        found: Logprobs = {}
        for sample in samples:
            session = llm.session(spec_for(*cache, removed, len(sample["context"]), layers))
            session.extend(sample["context"])
            for before, right in queries_of(sample):
                one = session.fork()
                one.extend(before)
                chosen = one.predict(right).float().log_softmax(-1).gather(1, torch.tensor(right)[:, None])
                found.setdefault(sample["kind"], []).append(chosen.mean().item())
        return found

    each_run(job, run)
    report({})


def spec_for(name: str, args: dict, removed: float, length: int, layers: int) -> CacheSpec:
    """The cache that keeps as many of `length` tokens as kvpress does, and has room for what follows."""
    kept = int(length * (1 - removed))
    if name == "dense":
        return CacheSpec("dense", cache_length=length + TAIL)
    if name == "lastrec":
        return CacheSpec(name, cache_length=kept, **args)
    tail = min(TAIL, length - kept - 8)  # all slots are fewer than the context's tokens, or none of them would go
    if args.get("budget") == "pyramid":  # without the tail's slots, and no layer has more than all tokens
        first = min((2 - 1 / PYRAMID) * kept, length - tail - 8)
        step = 2 * (first - kept) / (layers - 1)
        args = args | {"budget": [first - step * i + tail for i in range(layers)]}
    return CacheSpec(name, cache_length=kept + tail, tail=tail, **args)


if __name__ == "__main__":
    main()
