"""The interpreters that measurements run in, and how processes are started in them."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().parent / "workers"
ERROR_LINES = 15


@dataclass(frozen=True)
class Peer:
    """What is installed to compare with: a distribution, with our version of torch if it runs on that."""

    distribution: str
    version: str
    torch: bool = True
    undeclared: tuple[str, ...] = ()  # what it needs and does not ask for
    compiled: bool = False  # by pip, for this machine

    def versions(self, torch_version: str) -> dict[str, str]:
        """Of the distributions that matter."""
        return {self.distribution: self.version} | ({"torch": torch_version} if self.torch else {})


PEERS = {
    "litgpt": Peer("litgpt", "0.5.13", undeclared=("requests",)),  # its command line does not start without it
    "transformers": Peer("transformers", "5.3.0"),
    "llama": Peer("llama-cpp-python", "0.3.36", torch=False, compiled=True),
}
OTHER_PEERS = {"kvpress": Peer("kvpress", "0.5.5")}  # of a table of their own


# Instruction sets that all systems can be restricted to: the variables for this package, torch, oneDNN, and for compiling peers
RESTRICTIONS = {
    "avx2": {
        "LITGPT_KERNELS": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON "
        "-DGGML_BMI2=ON",
    }
}


def public_version(version: str) -> str:
    """A version without its local part: 2.13.0 for 2.13.0+cpu."""
    return version.partition("+")[0]


def ensure_environment(work_dir: Path, peer: str, torch_version: str, restrict: str | None = None) -> Path:
    """The interpreter of a virtual environment with a peer and what it runs on, made with pip if it is not there.

    A peer that is compiled has one for every restriction. Raises `subprocess.CalledProcessError` if that fails; the next call starts anew.
    """
    versions = (PEERS | OTHER_PEERS)[peer].versions(torch_version)
    words, env = [word for item in versions.items() for word in item], os.environ
    if restrict and (PEERS | OTHER_PEERS)[peer].compiled:
        words, env = [*words, restrict], os.environ | RESTRICTIONS[restrict]
    folder = work_dir / "-".join(words)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = folder / "complete"
    if not complete.is_file():
        requirements = [
            *(f"{name}=={version}" for name, version in versions.items()),
            *(PEERS | OTHER_PEERS)[peer].undeclared,
        ]
        print(f"Installing {' '.join(requirements)} into {folder} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *requirements]
        if env is not os.environ:  # wheels that pip compiled before are for other instructions
            install.append("--no-cache-dir")
        subprocess.run(install, check=True, stdout=sys.stderr, env=env)
        complete.touch()
    return check_python(python, peer, torch_version)


def check_python(python: Path, peer: str, torch_version: str) -> Path:
    """`python` itself; `ValueError` if it is not one with the expected versions of the peer and of torch, if it needs that."""
    versions = (PEERS | OTHER_PEERS)[peer].versions(torch_version)
    code = f"from importlib.metadata import version; print(*(version(name) for name in {list(versions)}))"
    python = Path(os.path.abspath(python.expanduser()))  # not resolve: a virtual environment's python is a link
    # isolated: the folder that we are in may hold another `litgpt`
    found = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True)
    if [public_version(word) for word in found.stdout.split()] != list(versions.values()):
        answer = (found.stdout + found.stderr).strip().splitlines() or ["no answer"]
        expected = " and ".join(f"{name} {version}" for name, version in versions.items())
        raise ValueError(f"{python} should have {expected}, but: {answer[-1]}")
    return python


@dataclass(frozen=True)
class Launcher:
    """Starts processes that all have the same number of threads and write into the same folder.

    Attributes:
        restrict: the instruction set that they use at most, of `RESTRICTIONS`; None: what the processor has.
    """

    work_dir: Path
    threads: int
    restrict: str | None = None

    def environment(self, own: bool) -> dict[str, str]:
        """Environment variables for an interpreter: `own` ones import this checkout, peers must not."""
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        if own:
            env["PYTHONPATH"] = str(ROOT)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        # unbuffered: an answer that sits in a pipe's buffer has not appeared
        return (
            env
            | threads
            | RESTRICTIONS.get(self.restrict, {})
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        )

    def work(self, python: Path, worker: str, job: dict, shown: bool = False) -> dict:
        """Runs a worker with a job and returns what it measured, the JSON in its last line. What it says meanwhile is `shown`.

        Raises `RuntimeError` with the end of its messages if it fails.
        """
        own = python == Path(sys.executable)
        command = [str(python), str(WORKERS / worker), json.dumps(job)]
        messages = None if shown else subprocess.PIPE
        options = {"env": self.environment(own), "cwd": self.work_dir, "stdout": subprocess.PIPE, "text": True}
        done = subprocess.run(command, stderr=messages, **options)
        if done.returncode != 0:
            raise RuntimeError(
                f"{worker} failed in {python}" + (f":\n{last_lines(done.stderr)}" if done.stderr else "")
            )
        return json.loads(done.stdout.strip().splitlines()[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every comparison of our own ways takes."""
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("~/.cache/litgpt-benchmarks"), help="weights, kept")
    add("--checkpoint", type=Path, help="the default model's folder or .gguf file (default: found, or fetched once)")
    add("--threads", type=int, default=2, help="CPU threads of every process (default: %(default)s)")
    add("--out", type=Path, help="write all samples as JSON")


def parse_numbers(parser: argparse.ArgumentParser, **least: int) -> argparse.Namespace:
    """The command line, if the numbers in it are at least so large; otherwise the parser's error says which is not."""
    args = parser.parse_args()
    for name, number in least.items():
        if getattr(args, name) < number:
            parser.error(f"--{name} must be at least {number}, got {getattr(args, name)}")
    return args


def run_script(
    args: argparse.Namespace, measure: Callable[[Launcher], tuple[dict, str]], precision: str = "bf16"
) -> int:
    """Print the table that `measure` gives beside its result, and write the result to `--out`. What goes wrong ends in one
    line."""
    work_dir = args.work_dir.expanduser().resolve()
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        result, table = measure(Launcher(work_dir, args.threads))
        about = f"{precision}, {args.threads} threads, torch {version('torch')}, {processor_name()}"
        print(f"{table}\n\n{about}")
        if args.out is not None:
            args.out.write_text(json.dumps(result | {"about": about}, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 1
    return 0


def last_lines(text: str) -> str:
    """The end of a process's messages."""
    return "\n".join(text.strip().splitlines()[-ERROR_LINES:])


def processor_name() -> str:
    """What the CPU calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
