"""Compares what cache policies leave of a text with the presses of kvpress: same weights, tokens, questions and budgets.

    python extensions/benchmarks/kvpress_table.py --runs runs.jsonl --out results.json

See README.md next to this file.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from environments import (
    Launcher,
    add_arguments,
    check_python,
    ensure_environment,
    parse_numbers,
    public_version,
    run_script,
)
from intervals import half_width
from layouts import ensure_layouts
from results import row

OWN = Path(sys.executable)
PAIRS = {  # by the names of the table: our cache with its arguments, and the press
    "lastrec, n_sink=4": (["lastrec", {"n_sink": 4}], "lastrec"),
    **{
        name: ([name, {}], name)
        for name in ("random", "knorm", "keydiff", "tova", "snapkv", "h2o", "expected", "compactor")
    },
    "keydiff, n_sink=0, recent=4": (["keydiff", {"n_sink": 0, "recent": 4}], "keydiff"),
    "snapkv, pyramid": (["snapkv", {"budget": "pyramid"}], "snapkv pyramid"),
    "kvzip": (["kvzip", {}], "kvzip alike"),
    "kvzip, kvpress by head": (["kvzip", {}], "kvzip layerwise"),
    "kvzip, kvpress by head and layer": (["kvzip", {}], "kvzip"),
    "kvzip, both by head and layer": (["kvzip", {"budget": "scores"}], "kvzip"),
}
KINDS = {"facts": "log-probability of answers", "text": "log-probability of the text that follows"}
SIDES = {"this": "press_ours.py", "kvpress": "kvpress_peer.py"}
FOLLOW = 160  # tokens that a text goes on for


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
    add("--runs", type=Path, help="a file that finished runs are kept in: the same command again does what is missing")
    add("--policies", default="all", help="names with semicolons between them, or all (default: %(default)s)")
    add("--removed", default="0.25,0.5,0.75", help="shares of the context that go (default: %(default)s)")
    add("--length", type=int, default=1000, help="tokens of a context (default: %(default)s)")
    add("--samples", type=int, default=4, help="contexts of each kind (default: %(default)s)")
    add("--facts", type=int, default=8, help="questions about each (default: %(default)s)")
    args = parse_numbers(parser, length=100, samples=1, facts=2)
    args.policies = list(PAIRS) if args.policies == "all" else [name.strip() for name in args.policies.split(";")]
    if unknown := [name for name in args.policies if name not in PAIRS]:
        parser.error(f"kvpress has no press for {unknown[0]}: there are {'; '.join(PAIRS)}")
    try:
        args.removed = [float(x) for x in args.removed.split(",")]
    except ValueError:
        parser.error(f"--removed takes shares with commas between them, got {args.removed}")
    if not all(0 < share < 1 for share in args.removed):
        parser.error(f"--removed takes shares above 0 and below 1, got {args.removed}")
    return args


def measure(launcher: Launcher, args: argparse.Namespace) -> dict:
    """Log-probabilities of every right answer under every cache, or why there are none."""
    torch = public_version(version("torch"))
    if args.kvpress_python is None:
        python = ensure_environment(launcher.work_dir, "kvpress", torch)
    else:
        python = check_python(args.kvpress_python, "kvpress", torch)
    layouts = ensure_layouts(launcher, args.checkpoint)
    name = f"{layouts.litgpt.parent.name}-{args.length}-{args.samples}-{args.facts}"
    samples = launcher.work_dir / f"press-samples-{name}.json"
    checkpoint = str(layouts.litgpt)
    if not samples.is_file():
        job = {"samples": args.samples, "facts": args.facts, "length": args.length, "follow": FOLLOW}
        launcher.work(OWN, "press_samples.py", job | {"checkpoint": checkpoint, "out": str(samples)})
    records = args.runs or launcher.work_dir / f"press-runs-{name}.jsonl"
    if args.runs is None:
        records.unlink(missing_ok=True)
    job = {"checkpoint": checkpoint, "folder": str(layouts.huggingface), "samples": str(samples)}
    job["records"] = str(records.resolve())
    shares = [(policy, share) for share in args.removed for policy in args.policies]
    found = {}
    for (side, worker), interpreter in zip(SIDES.items(), (OWN, python), strict=True):
        runs = {}
        for policy, share in [(None, 0.0), *shares]:
            cache = (["dense", {}], "dense")[side == "kvpress"] if policy is None else PAIRS[policy][side == "kvpress"]
            runs[policy, share] = {
                "key": f"{side} {name} {json.dumps(cache)} {share}",
                "cache": cache,
                "removed": share,
            }
        done = read(records)
        missing = {run["key"]: run for run in runs.values() if run["key"] not in done}
        if missing:
            launcher.work(interpreter, worker, job | {"runs": list(missing.values())}, shown=True)
            done = read(records)
        found[side] = {f"{policy or 'dense'} | {share}": done[run["key"]] for (policy, share), run in runs.items()}
    settings = {name: getattr(args, name) for name in ("policies", "removed", "length", "samples", "facts")}
    return {"found": found} | settings


def read(records: Path) -> dict[str, dict]:
    """Finished runs by their keys; a last line that was not written to its end does not count."""
    found = {}
    for line in records.read_text(encoding="utf-8").splitlines() if records.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"]] = record
    return found


def markdown(result: dict) -> str:
    """A table for each kind of sample: ours, kvpress' and the mean difference of both with its 95 % interval."""
    found, lines, reasons = result["found"], [], {}
    for kind, title in KINDS.items():
        heads = [head for x in result["removed"] for head in (f"{x:.0%} removed: ours", "kvpress", "difference")]
        lines += [row([title, *heads]), row(["---"] + ["---:"] * len(heads))]
        for name in result["policies"]:
            cells = [name]
            for share in result["removed"]:
                records = [found[side][f"{name} | {share}"] for side in SIDES]
                reasons |= {
                    f"{name}, {side}": x["error"] for side, x in zip(SIDES, records, strict=True) if "error" in x
                }
                ours, theirs = (record.get("logprobs", {}).get(kind) for record in records)
                cells += [f"{fmean(values):.3f}" if values else "" for values in (ours, theirs)]
                cells.append(difference(ours, theirs) if ours and theirs else "")
            lines.append(row(cells))
        dense = [fmean(found[side]["dense | 0.0"]["logprobs"][kind]) for side in SIDES]
        lines.append(f"\nDense: {dense[0]:.3f}, transformers {dense[1]:.3f}\n")
    return "\n".join(lines + [f"{name}: {reason}" for name, reason in reasons.items()])


def difference(ours: list[float], theirs: list[float]) -> str:
    """The mean difference with half its 95 % interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) == 1:
        return f"{differences[0]:+.3f}"
    return f"{fmean(differences):+.3f} ± {half_width(differences):.3f}"


if __name__ == "__main__":
    sys.exit(main())
