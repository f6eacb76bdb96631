"""LitGPT as its own `litgpt generate` runs it, eager: Fabric in bfloat16, a cache as long as prompt and answer."""

from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from timing import measure, peak_bytes, read_job, read_tokens, report, torch_instructions

from litgpt.config import Config
from litgpt.generate.base import generate_fn
from litgpt.model import GPT
from litgpt.utils import load_checkpoint


def main() -> None:
    job, imported = read_job(), peak_bytes()
    prompt = torch.tensor(read_tokens(job, job["context"]))
    length = len(prompt) + job["new_tokens"] + 1
    folder = Path(job["checkpoint"])
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module(empty_init=True):
        model = GPT(Config.from_file(folder / "model_config.yaml"))
    with fabric.init_tensor():
        model.max_seq_length = length
        model.set_kv_cache(batch_size=1)
    model = fabric.setup_module(model.eval())
    load_checkpoint(fabric, model, folder / "lit_model.pth")

    def generate() -> Iterator[int]:
        for token in generate_fn(model, prompt, length, temperature=0.0, include_prompt=False, include_eos=False):
            yield int(token)
        for block in model.transformer.h:
            block.attn.kv_cache.reset_parameters()

    result = measure(job, imported, torch.get_num_threads(), generate)
    report(result | {"note": torch_instructions(torch)})


if __name__ == "__main__":
    main()
