"""This package as `litgpt generate` runs it, with `--quantize` and `--compile` if the job says so: bfloat16, dense caches."""

from collections.abc import Iterator

import torch
from timing import measure, peak_bytes, read_job, read_tokens, report, torch_instructions

from litgpt.engine.loading import make_ready
from litgpt.generate.base import generate_fn
from litgpt.kernels import processor
from litgpt.kernels.library import library
from litgpt.model import GPT
from litgpt.runners.fused import FusedLayers


def main() -> None:
    job, imported = read_job(), peak_bytes()
    prompt = torch.tensor(read_tokens(job, job["context"]))
    options = {name: job[name] for name in ("quantize", "compile") if name in job}
    model = make_ready(job["checkpoint"], "bf16-true", device=torch.device("cpu"), **options).model

    def generate() -> Iterator[int]:
        length = len(prompt) + job["new_tokens"] + 1
        for token in generate_fn(model, prompt, length, temperature=0.0, include_prompt=False, include_eos=False):
            yield int(token)

    result = measure(job, imported, torch.get_num_threads(), generate)
    report(result | {"note": f"decoded {how_it_decodes(model)}; {instructions()}"})


def how_it_decodes(model: GPT) -> str:
    """Which of the ways to decode the model takes, after it did."""
    if isinstance(model.layer_runner, FusedLayers):
        return "by one call of the kernels for all layers"
    if model.layer_runner is None:
        return "layer by layer"
    return f"by {torch._dynamo.utils.counters['stats']['unique_graphs']} compiled graph(s)"


def instructions() -> str:
    """The instruction sets of the kernels and of torch."""
    kernels = "no kernels" if library() is None else f"kernels for {processor.instruction_set().name}"
    return f"{kernels}, {torch_instructions(torch)}"


if __name__ == "__main__":
    main()
