"""Fetches checkpoints from the Hugging Face hub: only the files that are needed, and all of them or none."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from litgpt.checkpoint.weight_files import choose_weight_files, read_weight_map
from litgpt.config import Config
from litgpt.errors import one_line
from litgpt.waiting import waiting

_ANSWER_SECONDS = 6.0
_T = TypeVar("_T")


def checkpoints_home() -> Path:
    """The folder of checkpoints: `$LITGPT_HOME`, else `checkpoints` in the current folder."""
    return Path(os.environ.get("LITGPT_HOME") or "checkpoints")


def fetch_checkpoint(
    repo_id: str,
    folder: Path | None = None,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    config: Config | None = None,
) -> Path:
    """Downloads the repository `repo_id` (`org/name`) and returns its folder.

    Weights come from safetensors, else from `pytorch_model*.bin`. An interrupted download is resumed; nothing is in
    `folder` until it is complete.

    Args:
        folder: Where to put it (default: `checkpoints_home() / repo_id`).
        access_token: Token for the hub (default: `$HF_TOKEN`, or the one that `hf auth login` has stored).
        tokenizer_only: Leave out the weights.
        config: The architecture of the weights, instead of the one in the repository's `config.json`.

    Raises:
        ConnectionError: The hub does not answer within seconds, or `HF_HUB_OFFLINE` is set.
        PermissionError: The repository asks for an agreement or a token.
        FileNotFoundError: There is no such repository, or it holds no weights of these formats.
        ValueError: Its architecture or quantisation is not supported, which is found before weights are downloaded.
    """
    folder = checkpoints_home() / repo_id if folder is None else folder
    names = _file_names(repo_id, access_token)
    partial = folder.with_name(f".{folder.name}.partial")
    with plain_disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)

    def fetch(*files: str) -> None:
        from huggingface_hub import hf_hub_download

        for name in files:
            _guarded(repo_id, lambda name=name: hf_hub_download(repo_id, name, local_dir=partial, token=access_token))

    from filelock import FileLock  # here, since the import takes a tenth of a second

    with plain_disk_errors(folder.parent), FileLock(f"{partial}.lock"):
        fetch(*(name for name in names if _is_side_file(name)))
        if not tokenizer_only:
            if (partial / "config.json").is_file():
                _refuse_unusable(partial, repo_id, config)
            fetch(*_weight_files(repo_id, names, fetch, partial))
        _publish(partial, folder)
    return folder


@contextmanager
def plain_disk_errors(folder: Path) -> Iterator[None]:
    """Turns the errors of a full or read-only disk into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "is full: free some space"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            why = "may not be written"
        else:
            raise
        raise OSError(f"the disk of {folder} {why}, or set LITGPT_HOME to another folder") from None


def _refuse_unusable(folder: Path, repo_id: str, config: Config | None) -> None:
    """Raises `ValueError` if, by `config.json`, the weights could not be used."""
    from litgpt.checkpoint.huggingface import HuggingFaceCheckpoint

    HuggingFaceCheckpoint(folder, config)
    if config is None:
        Config.from_hf(folder / "config.json", name=repo_id)


def _file_names(repo_id: str, access_token: str | None) -> list[str]:
    """The names of the repository's files. Asked in a thread, since looking up the host has no time limit."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConnectionError("the Hugging Face hub is not asked, since HF_HUB_OFFLINE is set")
    answer: Future[list[str]] = Future()

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(repo_id, timeout=_ANSWER_SECONDS, token=access_token)
            answer.set_result([file.rfilename for file in info.siblings or []])
        except Exception as error:
            answer.set_exception(error)

    with waiting("Asking the Hugging Face hub"):
        threading.Thread(target=ask, daemon=True).start()
        wait([answer], _ANSWER_SECONDS)

    def result() -> list[str]:
        if not answer.done():  # the thread may still set it later
            raise TimeoutError(f"no answer within {_ANSWER_SECONDS:.0f} seconds")
        return answer.result()

    return _guarded(repo_id, result)


def _guarded(repo_id: str, action: Callable[[], _T]) -> _T:
    """Runs `action`, turning errors of the hub's client into one line that says what to do."""
    from huggingface_hub import errors

    access = "pass --access_token or set HF_TOKEN"
    kinds: dict[type[Exception], tuple[type[Exception], str]] = {
        errors.GatedRepoError: (
            PermissionError,
            f"{repo_id} needs an agreement to its terms: agree at https://huggingface.co/{repo_id}, then {access}",
        ),
        errors.RepositoryNotFoundError: (
            FileNotFoundError,
            f"The Hugging Face hub has no model {repo_id!r}, or it is private: then {access}",
        ),
        errors.HFValidationError: (
            ValueError,
            f"{repo_id!r} is not the name of a model on the Hugging Face hub: org/name",
        ),
        json.JSONDecodeError: (
            ConnectionError,
            "the answer is not the Hugging Face hub's, but that of a proxy, or the login page of a network",
        ),
    }
    try:
        return action()
    except tuple(kinds) as error:
        kind, message = next(answer for known, answer in kinds.items() if isinstance(error, known))
        raise kind(message) from None
    except Exception as error:  # the client's network errors have no common class in all of its versions
        if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise  # an error of the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(f"The Hugging Face hub refuses {repo_id}: check --access_token or HF_TOKEN") from None
        if status is not None:
            raise ConnectionError(f"The Hugging Face hub failed with status {status}; try again later") from None
        raise ConnectionError(f"the Hugging Face hub cannot be reached ({one_line(error, 120)})") from None


def _is_side_file(name: str) -> bool:
    """Whether a file belongs to the tokenizer or the configuration."""
    is_index = name.endswith(".index.json")
    return "/" not in name and not is_index and (name.endswith((".json", ".jinja", ".model")) or name == "merges.txt")


def _weight_files(repo_id: str, names: list[str], fetch: Callable[..., None], partial: Path) -> list[str]:
    def read_index(name: str) -> dict[str, str]:
        fetch(name)
        return read_weight_map(partial / name)

    try:
        chosen, _ = choose_weight_files(names, read_index)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} is incomplete: {error}") from None
    if not chosen:
        raise FileNotFoundError(f"{repo_id} holds no weights: expected model*.safetensors or pytorch_model*.bin")
    return chosen


def _publish(partial: Path, folder: Path) -> None:
    """Moves a complete download to its folder."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's notes for resuming
    if not folder.exists():
        os.replace(partial, folder)
        return
    # the files that mark a folder as a model come last
    for file in sorted(partial.iterdir(), key=lambda file: file.name in ("config.json", "tokenizer.json")):
        os.replace(file, folder / file.name)
    partial.rmdir()
