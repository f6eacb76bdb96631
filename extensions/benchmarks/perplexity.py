"""Measures what quantising a model's weights costs in quality, and prints a Markdown table.

    python extensions/benchmarks/perplexity.py

See README.md next to this file.
"""

import argparse
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.engine.loading import default_device
from litgpt.model import GPT
from litgpt.runners.packed_weights import pack_linears

REFERENCE = "bf16"


class Quality(NamedTuple):
    """How well a model tells the text, and how it differs from a reference; means over tokens."""

    bytes: int
    loss: float  # nats
    divergence: float  # Kullback-Leibler, of its distributions from the reference's, nats
    agreement: float  # part of the tokens where both find the same one likeliest


def main() -> int:
    args = parse_arguments()
    try:
        checkpoint = open_checkpoint(find_checkpoint(args.checkpoint_dir))
        text = python_manual() if args.text is None else args.text.read_text(encoding="utf-8")
        tokens = checkpoint.tokenizer().encode(text, bos=False)
        count = min(args.windows, len(tokens) // args.length)
        if not count:
            raise ValueError(f"the text has {len(tokens)} tokens, and a window {args.length}: give a longer text")
        windows = tokens[: count * args.length].view(count, args.length)
        print(f"{count * args.length:,} tokens in windows of {args.length}", file=sys.stderr)
        print(table(measure(checkpoint, windows, args.modes)))
    except (ValueError, OSError) as error:
        print(f"perplexity.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint_dir", nargs="?", help="folder, .gguf file or name (default: the default model)")
    add("--text", type=Path, help="file of text (default: the manual that Python's help() shows)")
    add("--windows", type=int, default=16, help="most windows of text (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens in a window (default: %(default)s)")
    add("--modes", nargs="+", default=["int8", "int4"], help="what to compare with bfloat16 (default: int8 int4)")
    args = parser.parse_args()
    for name in ("windows", "length"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} must be at least 2, got {getattr(args, name)}")
    return args


def python_manual() -> str:
    """The language reference, as it is part of every Python: about 160,000 words of technical English."""
    from pydoc_data.topics import topics

    print(f"text: pydoc_data.topics of Python {platform.python_version()}", file=sys.stderr)
    return "\n\n".join(topics[name] for name in sorted(topics))


def measure(checkpoint: Checkpoint, windows: torch.Tensor, modes: list[str]) -> dict[str, Quality]:
    """The quality of a checkpoint's model for windows of tokens (n, T), in bfloat16 and quantised."""
    models, device = {}, default_device()
    for mode in (REFERENCE, *modes):
        models[mode] = load_model(checkpoint, torch.bfloat16, device, None if mode == REFERENCE else mode)
    sizes = {mode: weight_bytes(model) for mode, model in models.items()}
    sums = {mode: torch.zeros(3, dtype=torch.float64) for mode in models}
    for model in models.values():
        pack_linears(model)
    for i, window in enumerate(windows):
        for mode, model in models.items():
            log_probs = predictions(model, window)
            if mode == REFERENCE:
                expected = log_probs
            sums[mode] += torch.stack(
                [
                    F.nll_loss(log_probs[:-1], window[1:].long()),
                    F.kl_div(log_probs, expected, log_target=True, reduction="batchmean"),
                    (log_probs.argmax(-1) == expected.argmax(-1)).float().mean(),
                ]
            )
        print(f"\r{i + 1} of {len(windows)} windows", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {mode: Quality(sizes[mode], *(total / len(windows)).tolist()) for mode, total in sums.items()}


@torch.inference_mode()
def predictions(model: GPT, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T, V) after each token of a window (T,), which is seen alone, in float32 on the CPU."""
    return model(window[None].to(model.transformer.wte.weight.device))[0].float().log_softmax(-1).cpu()


def weight_bytes(model: GPT) -> int:
    """Bytes of all weights; shared ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def table(results: dict[str, Quality]) -> str:
    lines = [
        "| weights | MB | perplexity | divergence from bf16, nats | same likeliest token |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for mode, quality in results.items():
        perplexity = torch.tensor(quality.loss).exp().item()
        row = f"| {mode} | {quality.bytes / 1e6:.0f} | {perplexity:.2f} |"
        if mode != REFERENCE:
            row += f" {quality.divergence:.4f} | {quality.agreement:.1%} |"
        else:
            row += "  |  |"
        lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
