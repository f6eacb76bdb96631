"""Measures what quantising a model's weights, or its key-value caches, costs in quality, and prints a Markdown table.

    python extensions/benchmarks/perplexity.py
    python extensions/benchmarks/perplexity.py --length 4000 --windows 1 --kv_cache dense-int8 dense-k8v4 dense-int4

See README.md next to this file.
"""

import argparse
import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from environments import parse_numbers

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.engine.loading import default_device
from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.runners.packed_weights import pack_linears

REFERENCE = "bf16"
CHUNK = 512  # tokens of a call, where caches are compared


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
        if args.kv_cache:
            print(table(measure_caches(checkpoint, windows, args.kv_cache), "cache", "dense"))
        else:
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
    add("--kv_cache", nargs="+", help="compare these caches with the dense one instead, in bfloat16 (dense-int8 ...)")
    args = parse_numbers(parser, windows=1, length=2)
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
    for model in models.values():
        pack_linears(model)
    readers = {mode: functools.partial(predictions, model) for mode, model in models.items()}
    return compare(readers, sizes, windows)


def measure_caches(checkpoint: Checkpoint, windows: torch.Tensor, names: list[str]) -> dict[str, Quality]:
    """The quality of a checkpoint's model in bfloat16 with caches by name, the dense one first. Bytes are those of the caches."""
    model = load_model(checkpoint, torch.bfloat16, default_device(), None)
    pack_linears(model)
    specs = {name: CacheSpec.parse(name) for name in ("dense", *names)}
    length = windows.shape[1]
    specs = {
        name: CacheSpec.parse(spec, spec.cache_length or (None if spec.evicts else length))
        for name, spec in specs.items()
    }
    sizes = {name: spec.size(model, 1)[0] // 8 for name, spec in specs.items()}

    @torch.inference_mode()
    def read(spec: CacheSpec, window: torch.Tensor) -> torch.Tensor:
        model.clear_kv_caches(assigned=True)
        model.assign_kv_caches(spec.create(model, 1))
        idx = window[None].to(model.transformer.wte.weight.device)
        chunks = [model(chunk, CHUNK * i)[0] for i, chunk in enumerate(idx.split(CHUNK, dim=1))]
        return torch.cat(chunks).float().log_softmax(-1).cpu()

    return compare({name: functools.partial(read, spec) for name, spec in specs.items()}, sizes, windows)


def compare(
    readers: dict[str, Callable[[torch.Tensor], torch.Tensor]], sizes: dict[str, int], windows: torch.Tensor
) -> dict[str, Quality]:
    """The quality of what `readers` predict for windows of tokens (n, T), compared with the first one."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in readers}
    for i, window in enumerate(windows):
        expected = None
        for name, read in readers.items():
            log_probs = read(window)
            expected = log_probs if expected is None else expected
            sums[name] += torch.stack(
                [
                    F.nll_loss(log_probs[:-1], window[1:].long()),
                    F.kl_div(log_probs, expected, log_target=True, reduction="batchmean"),
                    (log_probs.argmax(-1) == expected.argmax(-1)).float().mean(),
                ]
            )
        print(f"\r{i + 1} of {len(windows)} windows", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {name: Quality(sizes[name], *(total / len(windows)).tolist()) for name, total in sums.items()}


@torch.inference_mode()
def predictions(model: GPT, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T, V) after each token of a window (T,), which is seen alone, in float32 on the CPU."""
    return model(window[None].to(model.transformer.wte.weight.device))[0].float().log_softmax(-1).cpu()


def weight_bytes(model: GPT) -> int:
    """Bytes of all weights; shared ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def table(results: dict[str, Quality], what: str = "weights", reference: str = REFERENCE) -> str:
    lines = [
        f"| {what} | MB | perplexity | divergence from {reference}, nats | same likeliest token |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for mode, quality in results.items():
        perplexity = torch.tensor(quality.loss).exp().item()
        row = f"| {mode} | {quality.bytes / 1e6:.0f} | {perplexity:.2f} |"
        if mode != reference:
            row += f" {quality.divergence:.4f} | {quality.agreement:.1%} |"
        else:
            row += "  |  |"
        lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
