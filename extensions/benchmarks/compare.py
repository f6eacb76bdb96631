"""Measures this package side by side with LitGPT, llama.cpp and transformers, and prints Markdown tables.

    python extensions/benchmarks/compare.py --out results.json
    python extensions/benchmarks/compare.py --systems ours,llama --contexts 128
    python extensions/benchmarks/compare.py --restrict avx2
    python extensions/benchmarks/compare.py --lastrec

See README.md next to this file.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import lastrec
import rounds
from environments import (
    PEERS,
    RESTRICTIONS,
    Launcher,
    check_python,
    ensure_environment,
    parse_numbers,
    processor_name,
    public_version,
)
from layouts import ensure_ggufs, ensure_layouts
from results import Samples, comparison, medians, ratios
from systems import SYSTEMS, System, choose


def main() -> int:
    args = parse_arguments()
    work_dir = args.work_dir.expanduser().resolve()
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        keep(args, run(args, work_dir))
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def keep(args: argparse.Namespace, result: dict) -> None:
    """Write a result to `--out`, or what there is of it so far, in place of what was there."""
    if args.out is not None:
        partial = args.out.with_name(f"{args.out.name}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("~/.cache/litgpt-benchmarks"), help="environments and weights, kept")
    add("--checkpoint", type=Path, help="the default model's folder or .gguf file (default: found, or fetched once)")
    for name, peer in PEERS.items():
        add(f"--{name}_python", type=Path, help=f"interpreter that has {peer.distribution} (default: set one up)")
    add("--systems", type=systems, default=SYSTEMS, help="a part of them only, such as ours,llama or ours-bf16,litgpt")
    add("--contexts", type=contexts, help="tokens of context (default: 128,2048,8000)")
    add("--rounds", type=int, default=5, help="times that every system is measured, in turn (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads of every process (default: %(default)s)")
    add(
        "--restrict",
        choices=[*RESTRICTIONS],
        help="no system uses more than these instructions; llama.cpp is compiled for them",
    )
    add("--lastrec", action="store_true", help="measure an evicting cache over a long text instead; needs no peers")
    add("--quick", action="store_true", help="one round with few tokens, to see that all of it works")
    add("--out", type=Path, help="write all samples and medians as JSON")
    args = parse_numbers(parser, rounds=1, threads=1)
    return args


def systems(text: str) -> tuple[System, ...]:
    """The value of `--systems`."""
    try:
        return choose(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def contexts(text: str) -> tuple[int, ...]:
    """The value of `--contexts`."""
    numbers = tuple(int(word) for word in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"a context has at least 1 token, got {min(numbers)}")
    return numbers


def run(args: argparse.Namespace, work_dir: Path) -> dict:
    """Measures what the arguments ask for, prints the tables, and returns everything as plain data."""
    repeats = 1 if args.quick else args.rounds
    launcher = Launcher(work_dir, args.threads, args.restrict)
    about = {"torch": version("torch"), "threads": args.threads, "processor": processor_name(), "rounds": repeats}
    about["restricted to"] = args.restrict
    caption = "bf16 unless said, batch 1, {threads} threads, torch {torch}, {processor}; rounds: {rounds}"
    caption = caption.format(**about) + (f"; restricted to {args.restrict}" if args.restrict else "")
    if args.lastrec:
        layouts = ensure_layouts(launcher, args.checkpoint)
        result = lastrec.measure(launcher, layouts, repeats, lastrec.QUICK if args.quick else lastrec.FULL)
        print(f"{lastrec.markdown(result)}\n\n{caption}")
        return about | result

    sizes = rounds.QUICK if args.quick else rounds.FULL
    if args.contexts is not None:
        sizes = replace(sizes, contexts=args.contexts)
    places = prepare(launcher, args)
    about["peers"] = {peer.distribution: peer.version for peer in PEERS.values()}

    def result(samples: Samples, notes: list[str]) -> dict:
        return about | {"samples": samples, "ratios": ratios(samples), "notes": notes}

    samples, notes = rounds.measure(
        launcher, args.systems, places, repeats, sizes, lambda *found: keep(args, result(*found))
    )
    tables = (comparison(samples, sizes.contexts), caption, medians(samples, sizes.contexts), "\n".join(notes))
    print("\n\n".join(tables))
    return result(samples, notes)


def prepare(launcher: Launcher, args: argparse.Namespace) -> rounds.Places:
    """Everything that the chosen systems need, made once."""
    torch_version = public_version(version("torch"))
    pythons = {}
    for group in dict.fromkeys(system.group for system in args.systems):
        python = Path(sys.executable) if group == "ours" else getattr(args, f"{group}_python")
        if python is None:
            python = ensure_environment(launcher.work_dir, group, torch_version, launcher.restrict)
        elif group in PEERS:
            python = check_python(python, group, torch_version)
        pythons[group] = python
    layouts = ensure_layouts(launcher, args.checkpoint)
    weights = {"litgpt": layouts.litgpt, "huggingface": layouts.huggingface}
    if "llama" in pythons:
        weights |= ensure_ggufs(launcher, args.checkpoint, pythons["llama"])
    return rounds.Places(pythons, weights, layouts.tokens)


if __name__ == "__main__":
    sys.exit(main())
