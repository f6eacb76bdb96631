"""This package as `litgpt generate` runs it: bfloat16, packed weights, dense caches; with `compile` as with `--compile`."""

from collections.abc import Iterator

import torch
from timing import measure, peak_bytes, read_job, read_tokens, report

from litgpt.generate.base import generate_fn
from litgpt.generate.setup import make_ready


def main() -> None:
    job, imported = read_job(), peak_bytes()
    prompt = read_tokens(job, job["context"])
    model = make_ready(job["checkpoint"], "bf16-true", compile=job["compile"], device=torch.device("cpu")).model

    def generate() -> Iterator[int]:
        length = len(prompt) + job["new_tokens"] + 1
        for token in generate_fn(model, prompt, length, temperature=0.0, include_prompt=False, include_eos=False):
            yield int(token)

    result = measure(job, imported, generate)
    if job["compile"]:
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    report(result)


if __name__ == "__main__":
    main()
