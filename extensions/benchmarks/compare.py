"""Measures this package side by side with LitGPT and transformers, and prints a Markdown table.

    python extensions/benchmarks/compare.py --out results.json
    python extensions/benchmarks/compare.py --lastrec

See README.md next to this file.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import lastrec
import rounds
from environments import PEERS, Launcher, check_python, ensure_environment, processor_name, public_version
from layouts import ensure_layouts
from results import markdown, ratios


def main() -> int:
    args = parse_arguments()
    work_dir = args.work_dir.expanduser().resolve()
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        result = run(args, work_dir)
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("~/.cache/litgpt-benchmarks"), help="environments and weights, kept")
    add("--checkpoint", type=Path, help="the default model's folder or .gguf file (default: found, or fetched once)")
    add("--litgpt_python", type=Path, help="interpreter that has the LitGPT to compare with (default: set one up)")
    add("--transformers_python", type=Path, help="interpreter that has transformers (default: set one up)")
    add("--rounds", type=int, default=5, help="times that every system is measured, in turn (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads of every process (default: %(default)s)")
    add("--lastrec", action="store_true", help="measure an evicting cache over a long text instead; needs no peers")
    add("--quick", action="store_true", help="one round with few tokens, to see that all of it works")
    add("--out", type=Path, help="write all samples and medians as JSON")
    args = parser.parse_args()
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def run(args: argparse.Namespace, work_dir: Path) -> dict:
    """Measures what the arguments ask for, prints the table, and returns everything as plain data."""
    repeats = 1 if args.quick else args.rounds
    launcher = Launcher(work_dir, args.threads)
    about = {"torch": version("torch"), "threads": args.threads, "processor": processor_name(), "rounds": repeats}
    caption = "bf16, batch 1, {threads} threads, torch {torch}, {processor}; rounds: {rounds}".format(**about)
    if args.lastrec:
        layouts = ensure_layouts(launcher, args.checkpoint)
        result = lastrec.measure(launcher, layouts, repeats, lastrec.QUICK if args.quick else lastrec.FULL)
        print(f"{lastrec.markdown(result)}\n\n{caption}")
        return about | result

    named = {"litgpt": args.litgpt_python, "transformers": args.transformers_python}
    torch_version = public_version(about["torch"])
    pythons = {}
    for peer, python in named.items():
        if python is None:
            pythons[peer] = ensure_environment(work_dir, peer, torch_version)
        else:
            pythons[peer] = check_python(python, peer, torch_version)
    layouts = ensure_layouts(launcher, args.checkpoint)
    systems = rounds.systems(pythons, layouts)
    samples, notes = rounds.measure(launcher, systems, layouts, repeats, rounds.QUICK if args.quick else rounds.FULL)
    print(f"{markdown(samples)}\n\n{caption}")
    for note in notes:
        print(note)
    return about | {"peers": PEERS, "samples": samples, "ratios": ratios(samples), "notes": notes}


if __name__ == "__main__":
    sys.exit(main())
