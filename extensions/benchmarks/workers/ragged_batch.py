"""Prompts of many lengths, answered together or one at a time."""

import time

import torch
from timing import read_job, read_tokens, report

from litgpt.engine.caches import prepare_caches
from litgpt.engine.engine import Engine
from litgpt.engine.loading import make_ready
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.model import GPT


def main() -> None:
    job = read_job()
    model = make_ready(job["checkpoint"], job["precision"], device=torch.device("cpu")).model
    lengths, new_tokens = job["lengths"], job["new_tokens"]
    text = torch.tensor(read_tokens(job, sum(lengths)))
    prompts = list(text.split(lengths))
    answer(model, prompts, 2)  # the first calls are not counted
    answer(model, prompts[:1], 2)
    report({kind: measure(model, prompts, new_tokens, kind) for kind in job["kinds"]})


def measure(model: GPT, prompts: list[torch.Tensor], new_tokens: int, kind: str) -> dict:
    """Seconds of prefill and of decode, in all, and the answers' tokens; `kind` is "together" or "alone"."""
    groups = [prompts] if kind == "together" else [[prompt] for prompt in prompts]
    found = [answer(model, group, new_tokens) for group in groups]
    tokens = [row for _, _, rows in found for row in rows]
    return {"prefill": sum(x[0] for x in found), "decode": sum(x[1] for x in found), "tokens": tokens}


def answer(model: GPT, prompts: list[torch.Tensor], new_tokens: int) -> tuple[float, float, list[list[int]]]:
    """Seconds of prefill and of decode, and the tokens of one batch."""
    sequences = [Sequence(prompt, new_tokens, Sampling(temperature=0)) for prompt in prompts]
    prepare_caches(model, len(prompts), max(sequence.max_length for sequence in sequences))
    engine, started = Engine(model), time.perf_counter()
    engine.add(sequences)
    prefilled = time.perf_counter()
    while engine.step():
        pass
    return prefilled - started, time.perf_counter() - prefilled, [sequence.output for sequence in sequences]


if __name__ == "__main__":
    main()
