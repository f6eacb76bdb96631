"""Writes a file or a folder completely or not at all, and removes temporary files of processes that were killed."""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, and abandoned files stay
    fcntl = None

_TORCH_WRITE_ERROR = re.compile(r"PytorchStreamWriter|inline_container\.cc")  # `torch.save` hides what the system said


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to, which is renamed to `path` when the block succeeds and removed when it fails.

    Links are followed, and the mode of a replaced file is kept. For a device or a pipe it is `path` itself. Temporary files
    of this path that belong to no running process are removed first. To keep the data written before a failure, rename the
    temporary file inside the block. Raises `IsADirectoryError` for a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    if (path.exists() and not path.is_file()) or path.parent == Path("/dev"):
        yield path
        return
    path = Path(os.path.realpath(path))
    _remove_abandoned(path)
    temporary, descriptor = _create(path)
    try:
        yield temporary
        os.fsync(descriptor)  # renamed before its data are on the disk, the file would be empty after a power failure
        if fcntl is None:  # Windows renames no open file
            os.close(descriptor)
            descriptor = -1
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except RuntimeError as error:
        raise _of_disk(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, which takes the name `folder` when the block ends well and is removed if not.

    The previous content stays until then. Temporary folders of killed runs beside it are removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned_folders(folder.parent, folder.name)
    temporary, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}.tmp") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except RuntimeError as error:
        raise _of_disk(error, folder) from None
    finally:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)


def remove_abandoned_folders(parent: Path, name: str) -> None:
    """Remove what runs that were killed have left of `replacing_folder` for folders called `name`, which may be a pattern. One that was
    put aside, and whose successor did not take its name, gets it again."""
    for folder in parent.glob(f".{name}.*.old.tmp"):
        own = folder.with_name(folder.name[1:].rsplit(".", 3)[0])
        if not own.exists():
            folder.rename(own)
    for folder in parent.glob(f".{name}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _of_disk(error: RuntimeError, path: Path) -> RuntimeError | OSError:
    """What an error of `torch.save` says of the disk; any other error as it is."""
    if not _TORCH_WRITE_ERROR.search(str(error)):
        return error
    return OSError(f"{path} could not be written whole: the disk of {path.parent} is full, or a limit reached")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder that no other process may write to in such a block; `ValueError` if one does. The system ends the claim of a
    process that was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is writing to {folder}: give another folder, or let it end") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def check_folder(folder: str | Path) -> None:
    """Raise `OSError` if files cannot be written to a folder, which need not exist yet. Nothing is left there."""
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{str(there)!r} is a file, and a folder is needed: give another name")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{folder} cannot be written to: {error.strerror}") from None


def _create(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked while the descriptor is open to show other processes that it is in use."""
    mode = path.stat().st_mode & 0o777 if path.exists() else None
    while True:
        temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if mode is not None:
            os.chmod(temporary, mode)
        _lock(descriptor)
        if os.fstat(descriptor).st_nlink or fcntl is None:
            return temporary, descriptor
        os.close(descriptor)  # another process removed it before it was locked


def _lock(descriptor: int) -> bool:
    """Whether this process now holds the lock of a file; False too where the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Writes the folder's entries to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name[:200])}\.\d+(-[0-9a-f]{{8}})?\.tmp")
    for file in path.parent.glob(".*.tmp"):
        if ours.fullmatch(file.name):
            with suppress(OSError):  # another's, or gone
                descriptor = os.open(file, os.O_RDWR)
                try:
                    if _lock(descriptor):
                        file.unlink()
                finally:
                    os.close(descriptor)
