"""Compares fine-tuning with LitGPT 0.5.13: tokens a second, and peak memory.

    python extensions/benchmarks/training.py --out results.json

See README.md next to this file.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import median

from environments import Launcher, add_arguments, ensure_environment, run_script
from layouts import ensure_layouts
from results import number, ratio, row

OURS, LITGPT = "this", "LitGPT"
CASES = {
    "equal": {"shortest": 256, "longest": 256, "max_seq_length": 256},
    "short": {"shortest": 20, "longest": 180, "max_seq_length": 512},
}


def main() -> int:
    args = parse_arguments()

    def run(launcher: Launcher) -> tuple[dict, str]:
        from importlib.metadata import version

        torch_version = version("torch").partition("+")[0]
        peer = (
            None
            if args.explain
            else args.litgpt_python or ensure_environment(launcher.work_dir, "litgpt", torch_version)
        )
        result = measure(launcher, ensure_layouts(launcher, args.checkpoint).litgpt, peer, args)
        return result, explanation(result) if args.explain else markdown(result)

    return run_script(args, run, args.precision)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_arguments(parser)
    add("--methods", default="lora,full", help="which, separated by commas (default: %(default)s)")
    add("--cases", default="equal,short", help="samples of equal length, or short ones (default: %(default)s)")
    add("--precision", default="32-true", help="of both (default: %(default)s)")
    add("--rounds", type=int, default=3, help="times that both are measured, in turn (default: %(default)s)")
    add(
        "--steps",
        type=int,
        default=4,
        help="optimizer steps, the first of which is not measured (default: %(default)s)",
    )
    add(
        "--explain",
        action="store_true",
        help="measure this package's steps once, by kind of work, instead of comparing",
    )
    add("--litgpt_python", type=Path, help="interpreter with LitGPT 0.5.13 (default: one is set up)")
    return parser.parse_args()


def write_samples(path: Path, shortest: int, longest: int) -> None:
    """Samples whose lengths lie evenly between the two, in a style of about 20 tokens, of a text's words."""
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8").split()
    draw = random.Random(0)
    samples = []
    for _ in range(400):
        count = draw.randint(shortest, longest) if longest > shortest else longest
        begin = draw.randrange(len(text) - 1)
        words = (text[begin:] + text)[
            : max(1, round(count * 1.2)) if longest == shortest else max(1, round(count * 0.6))
        ]
        samples.append({"instruction": "Go on.", "input": "", "output": " ".join(words)})
    path.write_text(json.dumps(samples), encoding="utf-8")


def measure(launcher: Launcher, checkpoint: Path, peer: Path | None, args: argparse.Namespace) -> dict:
    """Tokens per second and peak memory of every method and case, one for every round; each in a process of its own."""
    samples: dict[str, dict[str, list[dict]]] = {}
    for round_idx in range(1 if args.explain else args.rounds):
        for method in args.methods.split(","):
            for case in args.cases.split(","):
                sizes = CASES[case]
                path = launcher.work_dir / f"samples-{case}.json"
                write_samples(path, sizes["shortest"], sizes["longest"])
                job = {
                    "checkpoint": str(checkpoint),
                    "samples": str(path),
                    "method": method,
                    "precision": args.precision,
                    "steps": args.steps,
                    "threads": launcher.threads,
                    "max_seq_length": sizes["max_seq_length"],
                    "mask_prompt": False,
                    "micro_batch_size": 1 if case == "equal" else 4,
                    "accumulation": 4,
                    "out_dir": str(launcher.work_dir / "training"),
                }
                packed = {"pack": True, "micro_batch_size": 1} if case == "short" else {}
                systems = [(OURS, Path(sys.executable), job | packed | {"explain": args.explain}), (LITGPT, peer, job)]
                systems = systems[:1] if args.explain else systems
                for name, python, own in systems if round_idx % 2 == 0 else systems[::-1]:
                    print(f"round {round_idx + 1}/{args.rounds}, {method}, {case}: {name}", file=sys.stderr)
                    found = launcher.work(python, "train_steps.py", own)
                    samples.setdefault(f"{method}, {case}", {}).setdefault(name, []).append(found)
    return {"precision": args.precision, "samples": samples}


def markdown(result: dict) -> str:
    """A table of the medians, and of the rounds' own ratios."""
    lines = [
        row(["", "tokens/s", f"/ {LITGPT}", "peak memory, MB", f"/ {LITGPT}"]),
        row(["---", "---:", "---:", "---:", "---:"]),
    ]
    for case, systems in result["samples"].items():
        speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in systems.items()}
        memory = {name: [run["peak_bytes"] / 1e6 for run in runs] for name, runs in systems.items()}
        lines.append(
            row(
                [
                    case,
                    number(median(speeds[OURS])),
                    f"{ratio(speeds[OURS], speeds[LITGPT]):.2f}x",
                    number(median(memory[OURS])),
                    f"{ratio(memory[OURS], memory[LITGPT]):.2f}x",
                ]
            )
        )
    return "\n".join(lines)


def explanation(result: dict) -> str:
    """A table of the shares of a step."""
    runs = {case: systems[OURS][0]["shares"] for case, systems in result["samples"].items()}
    kinds = list(dict.fromkeys(kind for shares in runs.values() for kind in shares))
    lines = [row(["", *kinds]), row(["---", *["---:"] * len(kinds)])]
    lines += [row([case, *(f"{shares.get(kind, 0):.0%}" for kind in kinds)]) for case, shares in runs.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
