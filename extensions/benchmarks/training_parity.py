"""Compares the losses of fine-tuning with LitGPT 0.5.13, step by step, in float32.

    python extensions/benchmarks/training_parity.py --litgpt_python ENVIRONMENT/bin/python --out results.json

See README.md next to this file.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from environments import Launcher, add_arguments, ensure_environment, run_script
from layouts import ensure_layouts
from results import heading, row
from training import write_samples

METHODS = ("full", "lora", "adapter", "adapter_v2")
LARGEST_DIFFERENCE = 1e-4
LENGTH = 64  # tokens of every sample
RATES = {"full": 1e-5}  # learning rates; others: 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--litgpt_python", type=Path, help="interpreter with LitGPT 0.5.13 (default: one is set up)")
    args = parser.parse_args()

    def run(launcher: Launcher) -> tuple[dict, str]:
        torch_version = version("torch").partition("+")[0]
        peer = args.litgpt_python or ensure_environment(launcher.work_dir, "litgpt", torch_version)
        checkpoint = ensure_layouts(launcher, args.checkpoint).litgpt
        found = {}
        for method in args.methods.split(","):
            found[method] = compare(launcher, checkpoint, peer, method, args.steps)
            print(markdown({method: found[method]}), file=sys.stderr)
        return {"losses": found}, markdown(found)

    return run_script(args, run, "32-true")


def compare(launcher: Launcher, checkpoint: Path, peer: Path, method: str, steps: int) -> dict[str, list[float]]:
    """The losses of every step, of this package and of LitGPT, from the same weights, with the same samples in one order."""
    samples = launcher.work_dir / "samples-parity.json"
    write_samples(samples, 4 * LENGTH, 4 * LENGTH)  # all are cut to the same length
    job = {
        "checkpoint": str(checkpoint),
        "samples": str(samples),
        "method": method,
        "precision": "32-true",
        "steps": steps,
        "threads": launcher.threads,
        "max_seq_length": LENGTH,
        "mask_prompt": False,
        "micro_batch_size": 4,
        "accumulation": 1,
        "out_dir": str(launcher.work_dir / "training"),
        "optimizer": {
            "class_path": "same_start.SameStartAdamW",
            "init_args": {"lr": RATES.get(method, 1e-3), "redraw": method != "full"},
        },
        "options": {"lora_dropout": 0.0} if method == "lora" else {},
    }
    losses = {}
    for name, python, own in (("this", Path(sys.executable), {"tie_embeddings": False}), ("LitGPT", peer, {})):
        print(f"{method}: {name}", file=sys.stderr)
        losses[name] = launcher.work(python, "train_steps.py", job | {"train": own})["losses"]
    return losses


def markdown(losses: dict[str, dict[str, list[float]]]) -> str:
    """The first and last losses of both, and the largest difference of any step."""
    lines = heading(["first loss", "last loss", "LitGPT's last", "largest difference", ""])
    for method, of in losses.items():
        ours, theirs = of["this"], of["LitGPT"]
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        figures = [f"{x:.5f}" for x in (ours[0], ours[-1], theirs[-1])]
        verdict = "equal" if largest <= LARGEST_DIFFERENCE else f"more than {LARGEST_DIFFERENCE}"
        lines.append(row([method, *figures, f"{largest:.1e}", verdict]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
