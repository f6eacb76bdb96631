"""Finds the model that a user names, and downloads it if it is not on this disk."""

from pathlib import Path

from litgpt.checkpoint.default_model import DEFAULT_REPO, ensure_default_model
from litgpt.checkpoint.hub import checkpoints_home, fetch_checkpoint
from litgpt.config import Config


def find_checkpoint(name: Path | str | None, access_token: str | None = None) -> Path:
    """The folder or file of a checkpoint.

    Args:
        name: A path; or the name of a model, `org/name` or a known `name`, which is searched below the folder of
            checkpoints and else downloaded from the Hugging Face hub. None: the default model.
        access_token: Token for the hub, if the model needs one.

    Raises `FileNotFoundError` if there is no such path or model, `ConnectionError` if the hub does not answer.
    """
    if name is None:
        return ensure_default_model()
    if (found := find_local(name)) is not None:
        return found
    repo_id = _repo_id(Path(name))
    if repo_id is None:
        raise FileNotFoundError(
            f"{str(name)!r} is neither a folder, nor a file, nor the name of a model (`litgpt download list` shows names)"
        )
    if repo_id == DEFAULT_REPO:
        return ensure_default_model()
    try:
        return fetch_checkpoint(repo_id, access_token=access_token)
    except ConnectionError as error:
        raise ConnectionError(f"{str(name)!r} is not on this disk, and cannot be fetched: {error}") from None


def find_local(name: Path | str) -> Path | None:
    """The folder or file of a checkpoint that is on this disk: see `find_checkpoint`."""
    path = Path(name)
    if path.exists():
        return path
    for below_home in (checkpoints_home() / path, *checkpoints_home().glob(f"*/{path.name}")):
        if below_home.is_dir() and below_home.parts[-len(path.parts) :] == path.parts:
            return below_home
    return None


def _repo_id(path: Path) -> str | None:
    """The repository of a known model, or the path itself if it looks like `org/name`."""
    try:
        hub = Config.from_name(str(path)).hf_config
        return f"{hub['org']}/{hub['name']}"
    except ValueError:
        plain = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in (".", "..")
        return str(path) if plain and not path.suffix else None
