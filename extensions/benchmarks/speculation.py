"""Measures how much faster prompt lookup generates, and prints a Markdown table.

    python extensions/benchmarks/speculation.py --out results.json

See README.md next to this file.
"""

import argparse
import json
import sys
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from environments import parse_numbers, processor_name
from results import number, ratio, row

from litgpt.checkpoint.find import find_checkpoint
from litgpt.engine.caches import prepare_caches
from litgpt.engine.drafting import PromptLookup
from litgpt.engine.engine import Engine, decode
from litgpt.engine.loading import Ready, make_ready
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.prompts import encode_prompt

LICENSE = Path(__file__).parents[2] / "LICENSE"


class Run(NamedTuple):
    """What one generation gave: the new tokens, the time from the first of them to the last, and the numbers of draft tokens."""

    tokens: list[int]
    seconds: float
    drafted: int
    accepted: int

    @property
    def speed(self) -> float:
        return (len(self.tokens) - 1) / self.seconds


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    try:
        text = " ".join((LICENSE if args.text is None else args.text).read_text(encoding="utf-8").split())
        path = find_checkpoint(args.checkpoint)
        results = measure(path, text, args.rounds, args.words, args.new_tokens, args.prompt_lookup)
        about = f"{args.threads} threads, torch {version('torch')}, {processor_name()}; rounds: {args.rounds}"
        print(f"{markdown(results)}\n\n{about}")
        if args.out is not None:
            args.out.write_text(json.dumps({"about": about, "tasks": results}, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"speculation.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, help="folder or .gguf file (default: the default model)")
    add("--text", type=Path, help="file of the text to repeat (default: the licence)")
    add("--words", type=int, default=300, help="words of it (default: %(default)s)")
    add("--new_tokens", type=int, default=400, help="most tokens of an answer (default: %(default)s)")
    add("--prompt_lookup", type=int, default=15, help="most draft tokens at a time (default: %(default)s)")
    add("--rounds", type=int, default=5, help="times that both are measured, in turn (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--out", type=Path, help="write all samples as JSON")
    args = parse_numbers(parser, words=1, new_tokens=1, prompt_lookup=1, rounds=1, threads=1)
    return args


def tasks(text: str, words: int) -> dict[str, str]:
    """Prompts by name: answers that repeat the prompt, that repeat some of it, and that do not."""
    part = " ".join(text.split()[:words])
    return {
        "repeat": f"Repeat this text word for word:\n\n{part}",
        "summarise": f"Summarise this text:\n\n{part}",
        "tell": "Tell me a story about a lighthouse keeper.",
    }


def measure(path: Path, text: str, repeats: int, words: int, new_tokens: int, most: int) -> dict[str, dict]:
    """Samples of every task: speeds in bfloat16, and how many tokens are the same with and without drafts."""
    results: dict[str, dict] = {}
    for precision, rounds in (("bf16-true", repeats), ("32-true", 1)):
        ready = make_ready(path, precision)
        for name, prompt in tasks(text, words).items():
            found = results.setdefault(name, {})
            tokens = encode_prompt(ready.tokenizer, ready.prompt_style, prompt).to(ready.device)
            generate(ready, tokens, 8, most)  # what is made at the first use
            runs: dict[str, list[Run]] = {"plain": [], "lookup": []}
            for round_idx in range(rounds):
                for kind in ("plain", "lookup") if round_idx % 2 == 0 else ("lookup", "plain"):
                    print(f"{precision}, {name}, round {round_idx + 1}/{rounds}: {kind}", file=sys.stderr)
                    runs[kind].append(generate(ready, tokens, new_tokens, most if kind == "lookup" else None))
            plain, lookup = runs["plain"][0], runs["lookup"][0]
            same = zip(plain.tokens, lookup.tokens, strict=False)
            found[f"same, {precision}"] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
            found[f"new, {precision}"] = max(len(plain.tokens), len(lookup.tokens))
            if precision == "bf16-true":
                found["prompt"] = len(tokens)
                found["speeds"] = {kind: [run.speed for run in kind_runs] for kind, kind_runs in runs.items()}
                found |= {"drafted": lookup.drafted, "accepted": lookup.accepted}
    return results


def generate(ready: Ready, prompt: torch.Tensor, new_tokens: int, most: int | None) -> Run:
    """The greedy answer to a prompt, with up to `most` draft tokens at a time (None: no drafts)."""
    sequence = Sequence(prompt, new_tokens, Sampling(temperature=0.0), ready.stop_tokens)
    engine = Engine(ready.model, drafter=None if most is None else PromptLookup(most))
    prepare_caches(ready.model, 1, sequence.max_length)
    steps = decode(engine, [sequence])
    next(steps)
    started = perf_counter()
    for _ in steps:
        pass
    return Run(sequence.new_tokens, perf_counter() - started, engine.n_drafted, engine.n_accepted)


def markdown(results: dict[str, dict]) -> str:
    """A table with a row for every task; speeds are medians."""
    columns = ["task", "prompt", "answer", "plain, tokens/s", "lookup, tokens/s", "faster", "draft tokens accepted"]
    lines = [row([*columns, "same tokens, bf16", "fp32"]), row(["---", *["---:"] * 8])]
    for name, found in results.items():
        speeds = found["speeds"]
        accepted = f"{found['accepted']} of {found['drafted']}"
        same = [f"{found[f'same, {p}']} of {found[f'new, {p}']}" for p in ("bf16-true", "32-true")]
        cells = [name, str(found["prompt"]), str(found["new, bf16-true"])]
        cells += [number(median(speeds["plain"])), number(median(speeds["lookup"]))]
        lines.append(row([*cells, f"{ratio(speeds['lookup'], speeds['plain']):.2f}x", accepted, *same]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
