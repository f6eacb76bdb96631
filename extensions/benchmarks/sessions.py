"""Measures how much sooner a question about a long document is answered from a saved session, and prints a table.

    python extensions/benchmarks/sessions.py --out results.json

See README.md next to this file.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from environments import Launcher, add_arguments, parse_numbers, run_script
from layouts import Layouts, ensure_layouts
from results import number, ratio, row

QUESTION = 16  # tokens


def main() -> int:
    args = parse_arguments()

    def run(launcher: Launcher) -> tuple[dict, str]:
        result = measure(launcher, ensure_layouts(launcher, args.checkpoint), args)
        return result, markdown(result)

    return run_script(args, run)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_arguments(parser)
    add("--document", type=int, default=6000, help="tokens of the document (default: %(default)s)")
    add("--kv_cache", default="dense", help="cache of the sessions (default: %(default)s)")
    add("--cache_length", type=int, help="its slots (default: as many as needed)")
    add("--rounds", type=int, default=5, help="times that both are measured, in turn (default: %(default)s)")
    return parse_numbers(parser, document=1, rounds=1, threads=1)


def measure(launcher: Launcher, layouts: Layouts, args: argparse.Namespace) -> dict:
    """Seconds to the first token, by kind, one for every round; each from a process of its own.

    Raises `RuntimeError` if a restored session says anything but what the saved one did.
    """
    path = launcher.work_dir / "document.session"
    job = {"checkpoint": str(layouts.litgpt), "tokens": str(layouts.tokens), "session": str(path)}
    job |= {
        "document": args.document,
        "question": QUESTION,
        "kv_cache": args.kv_cache,
        "cache_length": args.cache_length,
    }
    samples: dict[str, list[float]] = {"fresh": [], "restore": [], "load": []}
    try:
        saved = launcher.work(Path(sys.executable), "long_document.py", job | {"kind": "save"})
        size = path.stat().st_size
        for round_idx in range(args.rounds):
            for kind in ("fresh", "restore") if round_idx % 2 == 0 else ("restore", "fresh"):
                print(f"round {round_idx + 1}/{args.rounds}: {kind}", file=sys.stderr)
                found = launcher.work(Path(sys.executable), "long_document.py", job | {"kind": kind})
                samples[kind].append(found["first"])
                if kind == "restore":
                    samples["load"].append(found["load"])
                    if (found["tokens"], found["logits"]) != (saved["tokens"], saved["logits"]):
                        raise RuntimeError(
                            f"restored: {found['tokens']}, but the saved session: {saved['tokens']}, or other logits"
                        )
    finally:
        path.unlink(missing_ok=True)
    sizes = {"bytes": size, "cache_bytes": saved["cache_bytes"]}
    return {"document": args.document, "save": saved["save"], "samples": samples} | sizes


def markdown(result: dict) -> str:
    """A table of the medians, and how much sooner the first token is there."""
    samples = result["samples"]
    fresh, restored, load = (median(samples[kind]) for kind in ("fresh", "restore", "load"))
    lines = [
        row([f"{result['document']:,} tokens of document, {QUESTION} of question", "first token after, s"]),
        row(["---", "---:"]),
        row(["prefilled", number(fresh)]),
        row(["restored from a file", f"{restored:.3f}"]),
        f"\n{ratio(samples['fresh'], samples['restore']):.1f}x sooner. The file has {result['bytes'] / 1e6:.2f} MB, the caches "
        f"{result['cache_bytes'] / 1e6:.2f} MB; reading "
        f"it took {load:.3f} s of that, writing it {result['save']:.2f} s.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
