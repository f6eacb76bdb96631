"""Measures conversions side by side with LitGPT, and prints a Markdown table.

    python extensions/benchmarks/convert.py --out results.json

See README.md next to this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

from environments import Launcher, check_python, ensure_environment, parse_numbers, processor_name, public_version
from results import LITGPT, OURS, Samples, number, ratio, row

# the model whose sizes the random weights have, and the most bytes of a file
FULL = ("tiny-llama-1.1b", 500_000_000)
QUICK = ("SmolLM2-135M", 80_000_000)
COMMANDS = ("convert_to_litgpt", "convert_from_litgpt")


def main() -> int:
    args = parse_arguments()
    work_dir = args.work_dir.expanduser().resolve()
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        result = run(args, work_dir)
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"convert.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("~/.cache/litgpt-benchmarks"), help="environments and weights, kept")
    add("--litgpt_python", type=Path, help="interpreter that has the LitGPT to compare with (default: set one up)")
    add("--rounds", type=int, default=5, help="times that both are measured, in turn (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads of every process (default: %(default)s)")
    add("--quick", action="store_true", help="one round with a small model, to see that all of it works")
    add("--out", type=Path, help="write all samples as JSON")
    args = parse_numbers(parser, rounds=1, threads=1)
    return args


def run(args: argparse.Namespace, work_dir: Path) -> dict:
    """Measures, prints the table, and returns everything as plain data."""
    torch_version, repeats = public_version(version("torch")), 1 if args.quick else args.rounds
    if args.litgpt_python is None:
        peer = ensure_environment(work_dir, "litgpt", torch_version)
    else:
        peer = check_python(args.litgpt_python, "litgpt", torch_version)
    launcher = Launcher(work_dir, args.threads)
    model, file_bytes = QUICK if args.quick else FULL
    source = ensure_source(launcher, model, file_bytes)
    samples = measure(launcher, {OURS: Path(sys.executable), LITGPT: peer}, source, model, repeats)
    files = sorted(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e9
    caption = f"{model}, random bf16 weights of {size:.2f} GB in {len(files)} files, {args.threads} threads"
    caption += f", torch {torch_version}, {processor_name()}; rounds: {repeats}"
    print(f"{markdown(samples)}\n\n{caption}\nBoth `lit_model.pth` hold the same weights.")
    return {"caption": caption, "samples": samples}


def ensure_source(launcher: Launcher, model: str, file_bytes: int) -> Path:
    """A Hugging Face folder with random weights in several files, written unless it is there already."""
    folder = launcher.work_dir / "weights" / f"random-{model}"
    if not folder.is_dir():
        print(f"Writing random weights to {folder} (once)", file=sys.stderr)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        job = {"model": model, "file_bytes": file_bytes, "out_dir": str(partial)}
        launcher.work(Path(sys.executable), "write_llama.py", job)
        os.replace(partial, folder)
    return folder


def measure(launcher: Launcher, pythons: dict[str, Path], source: Path, model: str, repeats: int) -> Samples:
    """Time and memory of both conversions in every interpreter, once a round.

    Raises `RuntimeError` if what the first round wrote as `lit_model.pth` differs.
    """
    samples: Samples = {}
    scratch = launcher.work_dir / "converted"
    folders = {name: scratch / str(i) for i, name in enumerate(pythons)}
    try:
        for round_idx in range(repeats):
            for name in pythons if round_idx % 2 == 0 else reversed(pythons):
                print(f"round {round_idx + 1}/{repeats}: {name}", file=sys.stderr)
                shutil.rmtree(folders[name], ignore_errors=True)
                link_files(source, folders[name] / "model")
                for command in COMMANDS:
                    job = {"command": command, "model": model, "folder": str(folders[name])}
                    os.sync()  # so that nobody waits for what was written before
                    found = launcher.work(pythons[name], "convert_weights.py", job)
                    for figure, value in found.items():
                        samples.setdefault(f"{command}, {figure}", {}).setdefault(name, []).append(value)
            if round_idx == 0:
                files = [str(folder / "model" / "lit_model.pth") for folder in folders.values()]
                launcher.work(Path(sys.executable), "compare_weights.py", {"files": files})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return samples


def link_files(source: Path, folder: Path) -> None:
    """A folder whose files are links to those of another."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)


def markdown(samples: Samples) -> str:
    """A row for every figure: the medians, and the median of the rounds' ratios."""
    lines = [row(["", OURS, LITGPT, f"{OURS} / {LITGPT}"]), row(["---", "---:", "---:", "---:"])]
    for figure, of in samples.items():
        medians = [number(median(of[name])) for name in (OURS, LITGPT)]
        lines.append(row([figure, *medians, f"{ratio(of[OURS], of[LITGPT]):.2f}x"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
