"""Compares what cache policies leave of a text with the presses of kvpress: same weights, tokens, questions and budgets.

    python extensions/benchmarks/kvpress_table.py --out results.json

See README.md next to this file.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from environments import Launcher, add_arguments, check_python, ensure_environment, public_version, run_script
from layouts import ensure_layouts
from results import row

OWN = Path(sys.executable)
PAIRS = {  # by the names of the table: our cache with its arguments, and the press
    "lastrec, n_sink=4": (["lastrec", {"n_sink": 4}], "lastrec"),
    **{
        name: ([name, {}], name)
        for name in ("random", "knorm", "keydiff", "tova", "snapkv", "h2o", "expected", "compactor", "kvzip")
    },
    "snapkv, pyramid": (["snapkv", {"budget": "pyramid"}], "snapkv pyramid"),
}
KINDS = {"facts": "log-probability of answers", "text": "log-probability of the text that follows"}


def main() -> int:
    args = parse_arguments()

    def run(launcher: Launcher) -> tuple[dict, str]:
        result = measure(launcher, args)
        return result, markdown(result)

    return run_script(args, run)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_arguments(parser)
    add("--kvpress_python", type=Path, help="an interpreter that has kvpress and torch (default: installed)")
    add("--policies", default="all", help="names with semicolons between them, or all (default: %(default)s)")
    add("--removed", default="0.25,0.5,0.75", help="shares of the context that go (default: %(default)s)")
    add("--length", type=int, default=1000, help="tokens of a context (default: %(default)s)")
    add("--samples", type=int, default=4, help="contexts of each kind (default: %(default)s)")
    add("--facts", type=int, default=8, help="questions about each (default: %(default)s)")
    args = parser.parse_args()
    args.policies = list(PAIRS) if args.policies == "all" else args.policies.split("; ")
    if unknown := [name for name in args.policies if name not in PAIRS]:
        parser.error(f"kvpress has no press for {unknown[0]}: there are {'; '.join(PAIRS)}")
    return args


def measure(launcher: Launcher, args: argparse.Namespace) -> dict:
    """Log-probabilities of every right answer under every cache."""
    torch = public_version(version("torch"))
    if args.kvpress_python is None:
        python = ensure_environment(launcher.work_dir, "kvpress", torch)
    else:
        python = check_python(args.kvpress_python, "kvpress", torch)
    layouts = ensure_layouts(launcher, args.checkpoint)
    samples = launcher.work_dir / f"press-samples-{layouts.litgpt.parent.name}.json"
    checkpoint = str(layouts.litgpt)
    job = {"checkpoint": checkpoint, "samples": args.samples, "facts": args.facts, "length": args.length, "follow": 160}
    launcher.work(OWN, "press_samples.py", job | {"out": str(samples)})
    removed = [float(x) for x in args.removed.split(",")]
    job = {"checkpoint": checkpoint, "folder": str(layouts.huggingface), "samples": str(samples)}
    found = {}
    caches, presses = ([PAIRS[name][i] for name in args.policies] for i in (0, 1))
    for where, interpreter, worker, kinds in (
        ("this", OWN, "press_ours.py", [["dense", {}], *caches]),
        ("kvpress", python, "kvpress_peer.py", ["dense", *presses]),
    ):
        print(where, file=sys.stderr)
        records = launcher.work(interpreter, worker, job | {"kinds": kinds, "removed": removed})
        names = ["dense"] + [name for name in args.policies for _ in removed]
        found[where] = {
            f"{n} | {record['removed']}": record["logprobs"] for n, record in zip(names, records, strict=True)
        }
    return {
        "found": found,
        "policies": args.policies,
        "removed": removed,
        "length": args.length,
        "samples": args.samples,
    }


def markdown(result: dict) -> str:
    """A table for each kind of sample: ours, kvpress' and the mean difference of both with its standard error."""
    found, lines = result["found"], []
    for kind, title in KINDS.items():
        heads = [f"{share:.0%} removed: ours | kvpress | difference" for share in result["removed"]]
        lines += [row([title, *" | ".join(heads).split(" | ")]), row(["---"] + ["---:"] * (3 * len(heads)))]
        for name in result["policies"]:
            cells = [name]
            for share in result["removed"]:
                ours, theirs = (found[where].get(f"{name} | {share}", {}).get(kind) for where in ("this", "kvpress"))
                if theirs is None:
                    cells += [f"{fmean(ours):.3f}", "", ""]
                    continue
                differences = [a - b for a, b in zip(ours, theirs, strict=True)]
                mean = fmean(differences)
                error = (
                    sum((x - mean) ** 2 for x in differences) / max(1, len(differences) - 1) / len(differences)
                ) ** 0.5
                cells += [f"{fmean(ours):.3f}", f"{fmean(theirs):.3f}", f"{mean:+.3f} ± {error:.3f}"]
            lines.append(row(cells))
        dense = [fmean(found[where]["dense | 0.0"][kind]) for where in ("this", "kvpress")]
        lines.append(f"\nDense: {dense[0]:.3f}, transformers {dense[1]:.3f}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
