"""Measures how long the first answer takes, when kernels or graphs are compiled, and how long the same later on.

    python extensions/benchmarks/warmup.py --out results.json

See README.md next to this file.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environments import Launcher, add_arguments, last_lines, parse_numbers, run_script
from layouts import ensure_layouts
from results import row

NO_KERNELS = {"LITGPT_KERNELS": "0"}
# what is measured: the options of `litgpt generate`, and variables of the environment
KINDS = {
    "kernels": ([], {}),
    "no kernels": ([], NO_KERNELS),
    "no kernels, `--compile`": (["--compile", "true"], NO_KERNELS),
}


def main() -> int:
    args = parse_arguments()

    def run(launcher: Launcher) -> tuple[dict, str]:
        checkpoint = ensure_layouts(launcher, args.checkpoint).litgpt
        result = {kind: measure(launcher, checkpoint, kind, args.processes, args.new_tokens) for kind in KINDS}
        return {"seconds": result}, markdown(result, args.new_tokens)

    return run_script(args, run)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_arguments(parser)
    add("--processes", type=int, default=3, help="processes one after the other (default: %(default)s)")
    add("--new_tokens", type=int, default=16, help="tokens of each answer (default: %(default)s)")
    args = parse_numbers(parser, processes=2, new_tokens=1, threads=1)  # the first of the processes compiles
    return args


def measure(launcher: Launcher, checkpoint: Path, kind: str, processes: int, new_tokens: int) -> list[float]:
    """Seconds from start to end of `litgpt generate` in each of so many processes, of which the first one finds nothing
    that was compiled before.

    Raises `RuntimeError` if one fails.
    """
    options, variables = KINDS[kind]
    command = [sys.executable, "-m", "litgpt", "generate", str(checkpoint), "--prompt", "Name three rivers."]
    command += ["--max_new_tokens", str(new_tokens), "--temperature", "0", "--precision", "bf16-true", *options]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor"))}
        env = launcher.environment(own=True) | caches | variables
        for number in range(1, processes + 1):
            print(f"{kind}: process {number} of {processes}", file=sys.stderr)
            started = time.perf_counter()
            done = subprocess.run(command, env=env, cwd=launcher.work_dir, capture_output=True, text=True)
            seconds.append(time.perf_counter() - started)
            if done.returncode != 0:
                raise RuntimeError(f"litgpt generate failed:\n{last_lines(done.stderr)}")
    return seconds


def markdown(result: dict[str, list[float]], new_tokens: int) -> str:
    """A table of the first process's seconds and of the quickest later one's."""
    lines = [
        row([f"`litgpt generate`, {new_tokens} tokens, s", "first process", "later ones"]),
        row(["---", "---:", "---:"]),
    ]
    for kind, (first, *later) in result.items():
        lines.append(row([kind, f"{first:.1f}", f"{min(later):.1f}"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
