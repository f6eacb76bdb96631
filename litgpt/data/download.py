"""Files that data modules fetch."""

import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from litgpt.atomic_file import replacing
from litgpt.waiting import report_progress, waiting

TIMEOUT = 10  # seconds without an answer


def download_if_missing(file_path: Path, file_url: str) -> None:
    """Fetch a file, unless it is there; `OSError` if it cannot be fetched. What is written is complete or not there."""
    if file_path.exists():
        return
    try:
        with urllib.request.urlopen(file_url, timeout=TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            file_path.parent.mkdir(parents=True, exist_ok=True)
            with (
                waiting(f"Fetching {file_path.name}", log=True),
                replacing(file_path) as temporary,
                open(temporary, "wb") as target,
            ):
                while chunk := answer.read(1 << 20):
                    target.write(chunk)
                    report_progress(target.tell(), size)
                if size and target.tell() != size:
                    raise ConnectionError(f"only {target.tell():,} of {size:,} bytes came")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"{file_url} could not be fetched ({reason}): put the file at {file_path} yourself") from None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive, unless `folder` is there."""
    if folder.is_dir():
        return
    partly = folder.with_name(f".{folder.name}.partly")
    with tarfile.open(archive) as file:
        file.extractall(partly, filter="data")
    partly.rename(folder)


def load_hub_dataset(repo_id: str, **kwargs: Any) -> Any:
    """`datasets.load_dataset`; `ValueError` without the package `datasets`, `OSError` if the data cannot be fetched, in a line."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"the data set {repo_id} needs the package datasets: pip install 'litgpt[datasets]'") from None
    if not (answers := hub_answers()):
        datasets.config.HF_HUB_OFFLINE = True  # else it retries for half a minute before it takes what is there
    try:
        return datasets.load_dataset(repo_id, **kwargs)
    except Exception as error:  # the package has no common class for its errors, and lets those of others through
        reason = " ".join(str(error).split())[:200] if answers else "it does not answer"
        raise OSError(f"the data set {repo_id} could not be fetched from the Hugging Face hub: {reason}") from None


def hub_answers() -> bool:
    """Whether the Hugging Face hub, or what `HF_ENDPOINT` names in its place, can be reached."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # an answer, too
    return True
