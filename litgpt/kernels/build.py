"""Compiles the C++ files of this folder for this machine, once, and keeps the result in a folder of this user's own.

Files in that folder are executed. So folder and files must belong to this user, nobody else may write them, and a file's
name has the digest of its content. A compiler that fails is not tried again.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from litgpt.kernels import processor
from litgpt.kernels.processor import InstructionSet
from litgpt.kernels.toolchain import toolchain
from litgpt.waiting import waiting

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Library:
    """What is compiled as one.

    Attributes:
        name: start of its file names.
        units: its source files, the longest first.
        serves: what is slower without it.
        flags: of its own.
    """

    name: str
    units: tuple[str, ...]
    serves: str
    flags: tuple[str, ...] = ()

    @property
    def progress(self) -> str:
        """What is said while it is compiled."""
        return f"Compiling kernels for {self.serves} on this processor, once, which takes some seconds"


KERNELS = Library("kernels", ("cpu", "products", "splits"), "inference")
ENCODED = Library("encoded", ("encoded_splits", "two_bits_splits"), "caches in fewer bits")
FLOAT32 = Library("float32", ("float32",), "models in float32", ("-DLITGPT_FLOAT32",))
TRAINING = Library("training", ("training", "products"), "training")

_one_at_a_time = threading.Lock()
Load = Callable[[str], ctypes.CDLL]  # from a path; `OSError` or `AttributeError` where that is no library of ours


class CompilationError(RuntimeError):
    """The compiler fails, or its output is no library."""


def kernels_for(
    target: InstructionSet, load: Load, announce: bool = True, what: Library = KERNELS
) -> ctypes.CDLL | None:
    """A library of kernels, compiled if it is not there yet, which is announced. None, after one line of explanation, if that
    is impossible."""
    compiler = toolchain().compiler()
    names = Names.of(target, compiler, what)
    for path in folders():
        try:
            with PrivateFolder.open(path) as folder:
                found = _load_compiled(folder, names, load)
                return found or _compile_and_load(folder, names, compiler, load, announce)
        except OSError as error:
            log.warning(f"{path} is not used for compiled kernels: {error.strerror or error}")
    return None


def compile_ahead(target: InstructionSet, what: Library = KERNELS) -> threading.Thread:
    """Compile a library in another thread, unless it is there, after those that are being compiled; `kernels_for` waits for it, and
    loads it."""
    compiled = object()

    def run() -> None:
        with _one_at_a_time:
            kernels_for(target, lambda path: compiled, False, what)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def folders() -> list[Path]:
    """Candidates for the folder of compiled kernels; the first usable one is taken."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [cache / "litgpt" / "kernels", Path(tempfile.gettempdir(), f"litgpt-kernels-{os.geteuid()}")]


@dataclass(frozen=True)
class Names:
    """File names of a library for this source, processor and compiler."""

    what: Library
    flags: tuple[str, ...]  # of the target and the library
    start: str
    compiler: str | None  # a part of the name; None: any

    @classmethod
    def of(cls, target: InstructionSet, compiler: str | None, what: Library = KERNELS) -> "Names":
        source = b"".join(path.read_bytes() for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.rglob("*.h"))))
        flags = (*target.flags, *what.flags)
        settings = " ".join((*toolchain().flags, *flags, processor.fingerprint()))
        start = f"{what.name}-{target.name}-{_digest(source, settings.encode())}"
        if compiler is None:
            return cls(what, flags, start, None)
        path = os.path.realpath(compiler)
        about = os.stat(path)
        return cls(what, flags, start, _digest(f"{path} {about.st_size} {about.st_mtime_ns}".encode())[:8])

    def digest_in(self, name: str) -> str | None:
        """The digest in the file name of a library; None if the name is not one of these."""
        match = re.fullmatch(rf"{re.escape(self.start)}-(\w+)\.(\w+)\.so", name)
        return match[2] if match and self.compiler in (None, match[1]) else None

    def library(self, content: bytes) -> str:
        return f"{self.start}-{self.compiler}.{_digest(content)}.so"

    @property
    def failure(self) -> str:
        return f"{self.start}-{self.compiler or 'none'}.failed"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


class PrivateFolder:
    """A folder that only this user may write. It stays open, so files are opened in it even if its path changes."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator["PrivateFolder"]:
        """Make the folder if it is not there.

        Raises:
            OSError: if that is not possible, or it is not this user's own alone.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check_owner(os.fstat(fd), "chmod go-w makes it fit")
            if os.fstatvfs(fd).f_flag & getattr(os, "ST_NOEXEC", 0):
                raise OSError("its file system is mounted with noexec")
            yield cls(path, fd)
        finally:
            os.close(fd)

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a regular file that belongs to this user.

        Raises:
            OSError: if the file is not of that kind.
        """
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=self.fd)
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                raise OSError(f"{name} is not a regular file")
            _check_owner(about)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.fd)

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically, also if the machine crashes."""
        temporary = f".{name}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)
        try:
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            self.remove(temporary)
            raise
        os.fsync(self.fd)

    @contextlib.contextmanager
    def lock(self, what: Library, announce: bool) -> Iterator[None]:
        """A lock that one thread has at a time, where the file system has locks. Waiting for it is announced."""
        fd = self.open_file(f"{what.name}.lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with _announced(what.progress) if announce else contextlib.nullcontext():
                    fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError:
                pass
            yield
        finally:
            os.close(fd)


def _check_owner(about: os.stat_result, remedy: str = "") -> None:
    if about.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if about.st_mode & 0o022:
        raise OSError(f"others may write it{remedy and f' ({remedy})'}")


def _load_compiled(folder: PrivateFolder, names: Names, load: Load) -> ctypes.CDLL | None:
    """The library if it is there with the right content; others are removed."""
    for name in sorted(os.listdir(folder.fd)):
        digest = names.digest_in(name)
        if digest is None:
            continue
        with contextlib.suppress(OSError, AttributeError):
            fd = folder.open_file(name)  # not closed: exactly this file is loaded
            with open(fd, "rb", closefd=False) as file:
                content = file.read()
            if _digest(content) == digest:
                itself = f"/proc/self/fd/{fd}"  # not on macOS
                return load(itself if os.path.exists(itself) else str(folder.path / name))
        folder.remove(name)
    return None


def _compile_and_load(
    folder: PrivateFolder, names: Names, compiler: str | None, load: Load, announce: bool
) -> ctypes.CDLL | None:
    """The library, compiled now, unless that failed before."""
    if _is_known_to_fail(folder, names):
        return None
    with folder.lock(names.what, announce):
        found = _load_compiled(folder, names, load)  # made by another process meanwhile
        if found is not None or _is_known_to_fail(folder, names):
            return found
        for name in os.listdir(folder.fd):
            if name.startswith(f".{names.what.name}-"):  # of a process that was killed
                folder.remove(name)
        try:
            if compiler is None:
                raise CompilationError(toolchain().missing())
            with _announced(names.what.progress) if announce else contextlib.nullcontext():
                content = _compile(compiler, names)
            folder.write(names.library(content), content)
            library = _load_compiled(folder, names, load)
            if library is None:
                raise CompilationError(f"{compiler} makes what cannot be loaded")
            return library
        except CompilationError as error:
            folder.write(names.failure, f"{error}\n".encode())
            log.warning(
                f"No compiled kernels for {names.what.serves}, which takes longer without them: {error} "
                f"(not tried again until {folder.path / names.failure} is deleted or the compiler is another)"
            )
            return None


def _is_known_to_fail(folder: PrivateFolder, names: Names) -> bool:
    try:
        os.close(folder.open_file(names.failure))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _announced(message: str) -> Iterator[None]:
    """Says what takes seconds: a spinner on a terminal, else a line in the log (stderr by default)."""
    if not sys.stderr.isatty():
        log.warning(message)
    with waiting(message):
        yield


def _compile(compiler: str, names: Names) -> bytes:
    """The content of the library. All units are compiled at once."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        units = {Path(temporary, f"{unit}.o"): SOURCES / f"{unit}.cpp" for unit in names.what.units}
        steps = (toolchain().compile_unit(names.flags, source, unit) for unit, source in units.items())
        running = [_start(compiler, step) for step in steps]
        for process in running:
            _finish(compiler, process)
        linked = Path(temporary, "kernels.so")
        _finish(compiler, _start(compiler, toolchain().link_units(units, linked)))
        if not linked.is_file():
            raise CompilationError(f"{compiler} makes no library")
        return linked.read_bytes()


def _start(compiler: str, arguments: list[str]) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        return subprocess.Popen([compiler, *arguments], **pipes, text=True, errors="replace")
    except OSError as error:
        raise CompilationError(f"{compiler} cannot be run: {error.strerror}") from None


def _finish(compiler: str, process: "subprocess.Popen[str]") -> None:
    with process:
        try:
            _, messages = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise CompilationError(f"{compiler} has not finished after {TIMEOUT} seconds") from None
    if process.returncode:
        lines = [line for line in messages.splitlines() if "error" in line] or ["no message"]
        raise CompilationError(f"{compiler} fails: {lines[0].strip()[:200]}")
