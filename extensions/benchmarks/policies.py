"""Measures how fast cache policies read a long text and decode after it, and the memory that takes, and prints a table.

    python extensions/benchmarks/policies.py --rounds 3
    python extensions/benchmarks/policies.py --caches dense-int8,dense-int4 --tokens 8000 --base dense --rounds 3
    python extensions/benchmarks/policies.py --caches snapkv,h2o --decode 10   # only how fast they decode, in 10 rounds

See README.md next to this file.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from environments import Launcher, add_arguments, parse_numbers, run_script
from layouts import ensure_layouts
from results import number, row

DECODE_ROUNDS = 5
DECODED = 64  # tokens of a turn, with one eviction of the usual tail
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
    add("--decode", type=int, default=0, help="measure nothing but decoding, in so many rounds (default: everything)")
    return parse_numbers(parser, tokens=2, slots=2, chunk=0, rounds=1, decode=0, threads=1)


def measure(launcher: Launcher, checkpoint: str, args: argparse.Namespace) -> dict:
    """Every figure of every cache, one for each round, and the bytes that one chunk takes beside the caches.

    Raises `RuntimeError` if caches have other bytes than their `size_estimate`.
    """
    tokens, chunk, rounds = args.tokens, args.chunk, args.decode or DECODE_ROUNDS
    others = args.caches.split(",")
    names = list(dict.fromkeys([args.base, *others] if args.decode else ["dense", args.base, *others]))
    slots = {name: tokens + DECODED if name.partition("-")[0] == "dense" else args.slots for name in names}
    job = {"checkpoint": checkpoint, "tokens": tokens, "chunk": chunk or None, "decoded": DECODED}
    print("decoding in turn", file=sys.stderr)
    decode = launcher.work(Path(sys.executable), "policy_turns.py", job | {"caches": slots, "rounds": rounds})
    found = {"samples": {}, "chunk_bytes": []} if args.decode else _alone(launcher, job, slots, args.rounds)
    own = {"tokens": tokens, "slots": args.slots, "chunk": chunk, "base": args.base, "decode_rounds": rounds}
    return {"decode": decode} | found | own


def _alone(launcher: Launcher, job: dict, slots: dict[str, int], repeats: int) -> dict:
    """What each cache does in a process of its own, and what a chunk takes."""
    samples: dict[str, list[dict]] = {name: [] for name in slots}
    of_chunk = []
    for round_idx in range(repeats):
        for name in list(slots) if round_idx % 2 == 0 else list(slots)[::-1]:
            print(f"round {round_idx + 1}/{repeats}: {name}", file=sys.stderr)
            length = {"kv_cache": name, "slots": slots[name]}
            found = launcher.work(Path(sys.executable), "policy_run.py", job | length)
            if found["bytes"] != found["estimated"]:
                raise RuntimeError(f"{name} has {found['bytes']} bytes, size_estimate says {found['estimated']}")
            samples[name].append(found)
        size = min(job["chunk"] or job["tokens"], job["tokens"])
        alone = job | {"kv_cache": "dense", "slots": size + DECODED, "tokens": size}
        found = launcher.work(Path(sys.executable), "policy_run.py", alone)
        of_chunk.append(found["peak_bytes"] - found["bytes"])
    return {"samples": samples, "chunk_bytes": of_chunk}


def markdown(result: dict) -> str:
    """A row for every cache: medians, and the medians of the rounds' ratios to those of one of them."""
    samples, decode, base = result["samples"], result["decode"], result["base"]
    heads = ["cache", "decode, tokens/s", f"/ {base}"]
    if samples:
        chunk = median(result["chunk_bytes"])
        heads += ["prefill, tokens/s", f"/ {base}", "caches, MB", f"/ {base}", "peak, MB", "/ (caches + chunk)"]
    lines = [row(heads), row(["---"] + ["---:"] * (len(heads) - 1))]
    for name, speeds in decode.items():
        cells = [name, *_beside(speeds, decode[base])]
        if samples:
            prefill = {own: [one["prefill_tokens_per_second"] for one in samples[own]] for own in (name, base)}
            size, peak = samples[name][0]["bytes"], median(one["peak_bytes"] for one in samples[name])
            cells += [
                *_beside(prefill[name], prefill[base]),
                f"{size / 1e6:.1f}",
                f"{size / samples[base][0]['bytes']:.2f}x",
            ]
            cells += [f"{peak / 1e6:.1f}", f"{peak / (size + chunk):.2f}x"]
        lines.append(row(cells))
    note = f"\n{result['tokens']:,} tokens, {result['slots']:,} slots; {result['decode_rounds']} rounds of decoding in turn."
    if samples:
        what = f"a chunk of {result['chunk']}" if result["chunk"] else "the whole text in one call"
        note += f" Peaks are above the model. Beside its caches, {what} takes {chunk / 1e6:.1f} MB"
    return "\n".join([*lines, note])


def _beside(speeds: list[float], of_base: list[float]) -> list[str]:
    """The median, and that of the ratios."""
    return [number(median(speeds)), f"{median(a / b for a, b in zip(speeds, of_base, strict=True)):.2f}x"]


if __name__ == "__main__":
    sys.exit(main())
