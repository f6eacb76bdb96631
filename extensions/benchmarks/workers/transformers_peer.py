"""transformers, eager, with a DynamicCache: the calls that its `generate` makes, without what it does around them."""

from collections.abc import Iterator

import torch
from timing import measure, peak_bytes, read_job, read_tokens, report, torch_instructions
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    job, imported = read_job(), peak_bytes()
    prompt = torch.tensor(read_tokens(job, job["context"]))
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate() -> Iterator[int]:
        cache, tokens = DynamicCache(config=model.config), prompt[None]
        for _ in range(1 + job["new_tokens"]):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            yield int(tokens)

    result = measure(job, imported, torch.get_num_threads(), generate)
    report(result | {"note": torch_instructions(torch)})


if __name__ == "__main__":
    main()
