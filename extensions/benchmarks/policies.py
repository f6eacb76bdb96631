"""Measures how fast cache policies read a long text and decode after it, and the memory that takes, and prints a table.

    python extensions/benchmarks/policies.py --rounds 3
    python extensions/benchmarks/policies.py --caches dense-int8,dense-int4 --tokens 8000 --base dense --rounds 3

See README.md next to this file.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from environments import Launcher, add_arguments, parse_numbers, run_script
from layouts import ensure_layouts
from results import number, row

DECODED = 128  # tokens: two evictions of the usual tail
POLICIES = "random,knorm,keydiff,tova,snapkv,h2o,lazy,expected,compactor"


def main() -> int:
    args = parse_arguments()

    def run(launcher: Launcher) -> tuple[dict, str]:
        checkpoint = str(ensure_layouts(launcher, args.checkpoint).litgpt)
        result = measure(launcher, checkpoint, args)
        return result, markdown(result)

    return run_script(args, run)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_arguments(parser)
    add(
        "--caches",
        default=POLICIES,
        help="names with commas between them, beside dense and the base (default: %(default)s)",
    )
    add("--base", default="lastrec", help="the cache that others are compared with (default: %(default)s)")
    add("--tokens", type=int, default=6000, help="tokens of the text (default: %(default)s)")
    add("--slots", type=int, default=1024, help="slots of caches that evict (default: %(default)s)")
    add("--chunk", type=int, default=512, help="tokens of a prefill call; 0: all in one (default: %(default)s)")
    add("--rounds", type=int, default=3, help="times that each is measured, in turn (default: %(default)s)")
    return parse_numbers(parser, tokens=2, slots=2, chunk=0, rounds=1, threads=1)


def measure(launcher: Launcher, checkpoint: str, args: argparse.Namespace) -> dict:
    """Every figure of every cache, one for each round, and the bytes that one chunk takes beside the caches.

    Raises `RuntimeError` if caches have other bytes than their `size_estimate`.
    """
    tokens, slots, chunk, repeats = args.tokens, args.slots, args.chunk, args.rounds
    names = list(dict.fromkeys(["dense", args.base, *args.caches.split(",")]))
    samples: dict[str, list[dict]] = {name: [] for name in names}
    of_chunk = []
    job = {"checkpoint": checkpoint, "tokens": tokens, "chunk": chunk or None, "decoded": DECODED}
    for round_idx in range(repeats):
        for name in names if round_idx % 2 == 0 else names[::-1]:
            print(f"round {round_idx + 1}/{repeats}: {name}", file=sys.stderr)
            length = tokens + DECODED if name.partition("-")[0] == "dense" else slots
            found = launcher.work(Path(sys.executable), "policy_run.py", job | {"kv_cache": name, "slots": length})
            if found["bytes"] != found["estimated"]:
                raise RuntimeError(f"{name} has {found['bytes']} bytes, size_estimate says {found['estimated']}")
            samples[name].append(found)
        size = min(chunk or tokens, tokens)
        alone = job | {"kv_cache": "dense", "slots": size + DECODED, "tokens": size}
        found = launcher.work(Path(sys.executable), "policy_run.py", alone)
        of_chunk.append(found["peak_bytes"] - found["bytes"])
    return {
        "samples": samples,
        "chunk_bytes": of_chunk,
        "tokens": tokens,
        "slots": slots,
        "chunk": chunk,
        "base": args.base,
    }


def markdown(result: dict) -> str:
    """A row for every cache: medians, and the medians of the rounds' ratios to those of one of them."""
    samples, chunk, base = result["samples"], median(result["chunk_bytes"]), result["base"]
    speeds = ("prefill_tokens_per_second", "decode_tokens_per_second")
    heads = ["cache", "prefill, tokens/s", f"/ {base}", "decode, tokens/s", f"/ {base}"]
    heads += ["caches, MB", f"/ {base}", "peak, MB", "/ (caches + chunk)"]
    lines = [row(heads), row(["---"] + ["---:"] * (len(heads) - 1))]
    for name, found in samples.items():
        cells = [name]
        for speed in speeds:
            ratios = [a[speed] / b[speed] for a, b in zip(found, samples[base], strict=True)]
            cells += [number(median(one[speed] for one in found)), f"{median(ratios):.2f}x"]
        size, peak = found[0]["bytes"], median(one["peak_bytes"] for one in found)
        of_base = f"{size / samples[base][0]['bytes']:.2f}x"
        lines.append(row([*cells, f"{size / 1e6:.1f}", of_base, f"{peak / 1e6:.1f}", f"{peak / (size + chunk):.2f}x"]))
    what = f"a chunk of {result['chunk']}" if result["chunk"] else "the whole text in one call"
    lines.append(
        f"\n{result['tokens']:,} tokens, {result['slots']:,} slots. Peaks are above the model. Beside its caches, {what} takes "
        f"{chunk / 1e6:.1f} MB"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
