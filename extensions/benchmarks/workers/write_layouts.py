"""Writes a checkpoint in bfloat16 as a LitGPT folder and as a Hugging Face folder, and the tokens of a text."""

import json
from pathlib import Path

import torch
from timing import read_job, report

from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.export import save_huggingface
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import save_litgpt


def main() -> None:
    job = read_job()
    checkpoint, out_dir = open_checkpoint(find_checkpoint(job["checkpoint"])), Path(job["out_dir"])
    save_litgpt(checkpoint, out_dir / "litgpt", dtype=torch.bfloat16)
    save_huggingface(checkpoint, out_dir / "huggingface", dtype=torch.bfloat16)
    tokens = checkpoint.tokenizer().encode(Path(job["text"]).read_text(encoding="utf-8")).tolist()
    (out_dir / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    report({"tokens": len(tokens)})


if __name__ == "__main__":
    main()
