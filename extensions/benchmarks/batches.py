"""Measures how much faster ragged prompts are answered together than one at a time, and prints a table.

    python extensions/benchmarks/batches.py --out results.json

See README.md next to this file.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from environments import Launcher, add_arguments, parse_numbers, run_script
from layouts import Layouts, ensure_layouts
from results import number, ratio, row

KINDS = ("together", "alone")


def main() -> int:
    args = parse_arguments()

    def run(launcher: Launcher) -> tuple[dict, str]:
        lengths = prompt_lengths(args.shortest, args.longest, args.prompts)
        result = measure(launcher, ensure_layouts(launcher, args.checkpoint), args.rounds, lengths, args.new_tokens)
        return result, markdown(result)

    return run_script(args, run)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_arguments(parser)
    add("--prompts", type=int, default=16, help="number of prompts (default: %(default)s)")
    add("--shortest", type=int, default=16, help="tokens of the shortest (default: %(default)s)")
    add("--longest", type=int, default=512, help="tokens of the longest (default: %(default)s)")
    add("--new_tokens", type=int, default=64, help="tokens of each answer (default: %(default)s)")
    add("--rounds", type=int, default=3, help="times that both are measured, in turn (default: %(default)s)")
    # of new tokens, the first comes with the prefill
    return parse_numbers(parser, prompts=1, shortest=1, longest=1, new_tokens=2, rounds=1, threads=1)


def prompt_lengths(shortest: int, longest: int, count: int) -> list[int]:
    """`count` lengths, evenly from the shortest to the longest."""
    return [round(shortest + (longest - shortest) * i / max(count - 1, 1)) for i in range(count)]


def measure(launcher: Launcher, layouts: Layouts, repeats: int, lengths: list[int], new_tokens: int) -> dict:
    """Seconds of prefill and decode, together and one at a time, one for every round; each round in its own process.

    Raises `RuntimeError` if an answer in float32 is not the one that its prompt gets alone.
    """
    job = {"checkpoint": str(layouts.litgpt), "tokens": str(layouts.tokens)}
    job |= {"lengths": lengths, "new_tokens": new_tokens}
    print("float32: does every row equal its own run?", file=sys.stderr)
    checked = launcher.work(Path(sys.executable), "ragged_batch.py", job | {"precision": "32-true", "kinds": KINDS})
    together, alone = (checked[kind]["tokens"] for kind in KINDS)
    wrong = [lengths[i] for i in range(len(lengths)) if together[i] != alone[i]]
    if wrong:
        raise RuntimeError(f"prompts of {wrong} tokens were answered otherwise in a batch than alone")
    samples = {f"{part} {kind}": [] for kind in KINDS for part in ("prefill", "decode")}
    for round_idx in range(repeats):
        kinds = KINDS if round_idx % 2 == 0 else KINDS[::-1]
        print(f"round {round_idx + 1}/{repeats}: {', '.join(kinds)}", file=sys.stderr)
        found = launcher.work(Path(sys.executable), "ragged_batch.py", job | {"precision": "bf16-true", "kinds": kinds})
        for sample, values in samples.items():
            part, _, kind = sample.partition(" ")
            values.append(found[kind][part])
    return {"lengths": lengths, "new_tokens": new_tokens, "samples": samples}


def markdown(result: dict) -> str:
    """A table of the medians in tokens per second, and of the rounds' own ratios."""
    samples, lengths, new = result["samples"], result["lengths"], result["new_tokens"]
    parts = {kind: zip(samples[f"prefill {kind}"], samples[f"decode {kind}"], strict=True) for kind in KINDS}
    totals = {kind: list(map(sum, parts[kind])) for kind in KINDS}
    figures = [
        ("prefill, prompt tokens/s", sum(lengths), [samples[f"prefill {kind}"] for kind in KINDS]),
        ("decode, new tokens/s", len(lengths) * (new - 1), [samples[f"decode {kind}"] for kind in KINDS]),
        ("all, new tokens/s", len(lengths) * new, [totals[kind] for kind in KINDS]),
    ]
    title = f"{len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens, {new} new tokens each"
    lines = [
        row([title, "together", "one at a time", "together / one at a time"]),
        row(["---", "---:", "---:", "---:"]),
    ]
    for name, tokens, (together, alone) in figures:
        speeds = [number(tokens / median(seconds)) for seconds in (together, alone)]
        lines.append(row([name, *speeds, f"{ratio(alone, together):.2f}x"]))
    lines.append("\nIn float32 every answer of the batch was the one that its prompt gets alone.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
