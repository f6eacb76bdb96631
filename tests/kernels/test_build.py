"""What is compiled is kept where nobody else can put anything, used only as it was written, and made once.

The compiler of these tests is a script that copies the library that this machine has already.
"""

import ctypes
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from until import until

from litgpt.kernels import build, processor
from litgpt.kernels.library import _load, library

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels on this machine")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")

load = partial(_load, "KERNELS")
WAITS = "until [ -e '{gate}' ]; do sleep 0.05; done; cat"
COPIES = """#!/bin/sh
echo run >> "{log}"
while [ "$1" != -o ]; do shift; done
cat "{made}" > "$2"
"""


class Machine:
    """Folders of its own, and a compiler."""

    def __init__(self, path: Path, monkeypatch, caplog) -> None:
        self.path, self.log, self.caplog, self.monkeypatch = path, path / "log", caplog, monkeypatch
        self.temporary = path / "temporary"
        self.temporary.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        monkeypatch.setattr(build.tempfile, "tempdir", str(self.temporary))
        self.gate = path / "gate"  # the file that compilers may wait for
        self.made = path / "made by the real one"
        self.made.write_bytes(Path(library()._name).read_bytes())
        self.compiler()

    def compiler(self, script: str = COPIES, made: Path | None = None) -> None:
        path = self.path / "c++"
        path.write_text(script.format(log=self.log, made=made or self.made, gate=self.gate))
        path.chmod(0o755)
        self.monkeypatch.setenv("CXX", str(path))

    def kernels(self) -> ctypes.CDLL | None:
        self.caplog.clear()
        return build.kernels_for(processor.instruction_set(), load)

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().split()) // (len(build.KERNELS.units) + 1) if self.log.exists() else 0

    @property
    def said(self) -> list[str]:
        return [message for message in self.caplog.messages if not message.startswith("Compiling kernels")]

    @property
    def folder(self) -> Path:
        return self.path / "cache" / "litgpt" / "kernels"

    def libraries(self, folder: Path | None = None) -> list[Path]:
        return sorted((folder or self.folder).glob("*.so"))


@pytest.fixture
def machine(tmp_path, monkeypatch, caplog):
    one = Machine(tmp_path, monkeypatch, caplog)
    yield one
    one.gate.touch()


def test_they_are_compiled_once_in_a_folder_that_only_the_user_may_write(machine):
    assert machine.kernels() is not None
    assert [message[:17] for message in machine.caplog.messages] == ["Compiling kernels"]
    assert machine.folder.stat().st_mode & 0o777 == 0o700
    assert machine.kernels() is not None
    assert machine.caplog.messages == []
    assert machine.compilations == 1
    (path,) = machine.libraries()
    assert path.name.startswith(f"kernels-{processor.instruction_set().name}-")
    assert {p.name for p in machine.folder.iterdir()} == {path.name, "kernels.lock"}
    assert path.stat().st_mode & 0o077 == 0


def test_without_the_compiler_what_it_made_still_serves(machine):
    machine.kernels()
    machine.monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.kernels() is not None
    assert machine.caplog.messages == []


def put(path: Path, content: bytes) -> None:
    """A file of its own: the one that was there may be in use."""
    path.unlink()
    path.write_bytes(content)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    put(path, content)


def replace_by_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: put(path, path.read_bytes()[:100_000]),
        lambda path: put(path, b""),
        damage,
        replace_by_a_link,
        lambda path: path.chmod(0o666),
        pytest.param(lambda path: os.chown(path, 12345, -1), marks=needs_root),
    ],
    ids=["cut short", "empty", "damaged", "link", "others may write it", "another user's"],
)
def test_a_library_that_is_not_as_it_was_written_is_made_again(machine, change):
    machine.kernels()
    (path,) = machine.libraries()
    change(path)
    assert machine.kernels() is not None
    assert (machine.compilations, machine.said) == (2, [])
    assert machine.kernels() is not None
    assert machine.compilations == 2
    assert machine.libraries() == [path]
    assert not path.is_symlink()


def test_a_library_without_the_functions_is_made_again(machine):
    """Its digest is right: it was written so by an earlier version, or by someone who knows how."""
    machine.kernels()
    (path,) = machine.libraries()
    other = subprocess.run(["g++", "-shared", "-x", "c++", "-", "-o", machine.path / "x.so"], input=b"int x;")
    other.check_returncode()
    content = (machine.path / "x.so").read_bytes()
    path.unlink()
    path = path.with_name(re.sub(r"\.\w+\.so$", f".{build._digest(content)}.so", path.name))
    path.write_bytes(content)
    path.chmod(0o600)
    assert machine.kernels() is not None
    assert machine.compilations == 2
    assert path not in machine.libraries()


def make_writable(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def give_away(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 12345, -1)


def link_to_another(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    (folder.parent / "other").mkdir()
    folder.symlink_to(folder.parent / "other")


def put_a_file_there(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


@pytest.mark.parametrize(
    "make", [make_writable, pytest.param(give_away, marks=needs_root), link_to_another, put_a_file_there]
)
def test_a_folder_that_others_may_write_is_not_used(machine, make):
    make(machine.folder)
    assert machine.kernels() is not None
    assert len(machine.said) == 1
    assert "is not used for compiled kernels" in machine.said[0]
    assert not machine.folder.is_dir() or list(machine.folder.iterdir()) == []
    (own,) = machine.temporary.iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    assert len(machine.libraries(own)) == 1
    assert machine.kernels() is not None
    assert machine.compilations == 1


def test_what_others_have_put_into_their_folder_is_not_loaded(machine):
    machine.kernels()
    machine.folder.chmod(0o777)
    assert machine.kernels() is not None
    assert machine.compilations == 2  # not taken from there


def test_with_no_folder_there_are_no_kernels_and_a_line_for_each_says_why(machine):
    put_a_file_there(machine.folder)
    machine.monkeypatch.setattr(build.tempfile, "tempdir", str(machine.made))
    assert machine.kernels() is None
    assert len(machine.said) == 2


def test_a_folder_from_which_nothing_may_be_executed_is_not_used(machine, monkeypatch):
    flags = iter([build.os.ST_NOEXEC, 0])
    monkeypatch.setattr(build.os, "fstatvfs", lambda fd: SimpleNamespace(f_flag=next(flags)))
    assert machine.kernels() is not None
    assert [message.split(": ")[1] for message in machine.said] == ["its file system is mounted with noexec"]
    assert machine.libraries() == []


FAILING = {
    "fails": "#!/bin/sh\necho run >> {log}\necho run >> {log}\necho 'x.h:1: fatal error: no header' >&2; exit 1",
    "makes nothing": "#!/bin/sh\necho run >> {log}",
    "cannot be run": "not a script",
}


@pytest.mark.parametrize("script", FAILING.values(), ids=FAILING)
def test_a_compiler_that_fails_is_named_once_and_not_tried_again(machine, script):
    machine.compiler(script)
    assert machine.kernels() is None
    assert len(machine.said) == 1
    assert machine.said[0].startswith("No compiled kernels")
    runs = machine.compilations
    assert machine.kernels() is None
    assert (machine.said, machine.compilations) == ([], runs)
    machine.compiler()  # another one
    assert machine.kernels() is not None
    assert machine.said == []


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF\x02\x01\x01"])
def test_a_compiler_that_makes_no_library_is_one_that_fails(machine, content):
    (machine.path / "made").write_bytes(content)
    machine.compiler(made=machine.path / "made")
    assert machine.kernels() is None
    assert len(machine.said) == 1
    assert "cannot be loaded" in machine.said[0]
    assert machine.kernels() is None
    assert (machine.said, machine.compilations) == ([], 1)


def test_a_failure_names_what_its_library_serves(machine):
    machine.compiler(FAILING["fails"])
    assert build.kernels_for(processor.instruction_set(), load, what=build.TRAINING) is None
    (said,) = machine.said
    assert said.startswith("No compiled kernels for training, ")
    assert "\n" not in said
    machine.compiler()
    assert machine.kernels() is not None
    assert machine.said == []


def test_a_missing_compiler_is_named_once(machine):
    machine.monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.kernels() is None
    assert len(machine.said) == 1
    assert "no compiler 'no-such-compiler'" in machine.said[0]
    assert machine.kernels() is None
    assert machine.said == []
    machine.compiler()
    assert machine.kernels() is not None


def test_processes_that_start_at_once_compile_once(machine):
    machine.compiler(COPIES.replace("cat", "sleep 0.2; cat"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: build.kernels_for(processor.instruction_set(), load), range(4)))
    assert None not in found
    assert machine.compilations == 1


def test_what_a_killed_process_has_left_is_removed(machine):
    machine.folder.mkdir(parents=True, mode=0o700)
    left = machine.folder / ".kernels-x.so.123"
    left.write_bytes(b"half")
    assert machine.kernels() is not None
    assert not left.exists()


def test_a_full_disk_leaves_nothing_half_written(machine, monkeypatch):
    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.os, "fsync", no_space)
    assert machine.kernels() is None
    assert len(machine.said) == 2
    assert [p for p in machine.folder.iterdir() if p.name != "kernels.lock"] == []


def test_what_is_compiled_ahead_is_waited_for_and_loaded(machine):
    machine.compiler(COPIES.replace("cat", WAITS))
    ahead = build.compile_ahead(processor.instruction_set())
    until(machine.log.exists)
    assert ahead.is_alive()
    threading.Timer(0.2, machine.gate.touch).start()
    assert machine.kernels() is not None
    assert machine.compilations == 1
    ahead.join()
    build.compile_ahead(processor.instruction_set()).join()
    assert machine.kernels() is not None
    assert machine.compilations == 1


def test_a_failure_ahead_is_told_once(machine):
    machine.compiler(FAILING["fails"])
    build.compile_ahead(processor.instruction_set()).join()
    assert [message[:19] for message in machine.caplog.messages] == ["No compiled kernels"]
    assert machine.kernels() is None
    assert machine.said == []


def test_a_command_that_fails_does_not_wait_for_the_compiler(machine):
    machine.compiler(COPIES.replace("cat", WAITS))
    command = [sys.executable, "-m", "litgpt", "generate", str(machine.path / "no model")]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=200)
    machine.gate.touch()
    assert done.returncode == 1
    assert "no model" in done.stderr.splitlines()[-1]
