"""Measures how long the first answer takes, when kernels or graphs are compiled, and how long the same later on.

    python extensions/benchmarks/warmup.py --out results.json

See README.md next to this file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from environments import Launcher, last_lines, processor_name
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
    work_dir = args.work_dir.expanduser().resolve()
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        launcher = Launcher(work_dir, args.threads)
        checkpoint = ensure_layouts(launcher, args.checkpoint).litgpt
        result = {kind: measure(launcher, checkpoint, kind, args.processes, args.new_tokens) for kind in KINDS}
        about = f"bf16, {args.threads} threads, torch {version('torch')}, {processor_name()}"
        print(f"{markdown(result, args.new_tokens)}\n\n{about}")
        if args.out is not None:
            args.out.write_text(json.dumps({"seconds": result, "about": about}, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"warmup.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("~/.cache/litgpt-benchmarks"), help="weights, kept")
    add("--checkpoint", type=Path, help="the default model's folder or .gguf file (default: found, or fetched once)")
    add("--processes", type=int, default=3, help="processes one after the other (default: %(default)s)")
    add("--new_tokens", type=int, default=16, help="tokens of each answer (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads of every process (default: %(default)s)")
    add("--out", type=Path, help="write all samples as JSON")
    args = parser.parse_args()
    if args.processes < 2:
        parser.error(f"--processes must be at least 2, of which the first one compiles, got {args.processes}")
    for name in ("new_tokens", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
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
