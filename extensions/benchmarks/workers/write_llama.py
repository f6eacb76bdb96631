"""Writes a Hugging Face folder with random bfloat16 weights in several files."""

import torch
from timing import read_job, report

from litgpt.checkpoint.export import save_huggingface
from litgpt.config import Config
from litgpt.model import GPT


def main() -> None:
    job = read_job()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = GPT(Config.from_name(job["model"]))
    save_huggingface(model, job["out_dir"], shard_bytes=job["file_bytes"])
    report({"parameters": sum(parameter.numel() for parameter in model.parameters())})


if __name__ == "__main__":
    main()
