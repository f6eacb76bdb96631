import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt.atomic_file import check_folder, only_writer, remove_abandoned_folders, replacing, replacing_folder

posix = pytest.mark.skipif(os.name != "posix", reason="links, modes and locks of POSIX")


def write(path, text, error=None, keep=None):
    with replacing(path) as temporary:
        temporary.write_text(text)
        if keep is not None:
            os.replace(temporary, keep)
        if error is not None:
            raise error


def test_the_file_is_the_old_one_until_the_block_ends(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_alone(error, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(error):
        write(path, "half", error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_what_was_written_before_a_failure_can_be_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", "half", KeyboardInterrupt, keep=tmp_path / "x.partial")
    assert os.listdir(tmp_path) == ["x.partial"]


def test_two_writers_in_one_process_do_not_share_a_temporary_file(tmp_path):
    with replacing(tmp_path / "x") as first, replacing(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first"  # the outer block ends last
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write(tmp_path, "text")


@posix
def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with only_writer(tmp_path / "new"), pytest.raises(ValueError, match="another process is writing to .*new"):
        only_writer(tmp_path / "new").__enter__()
    with only_writer(tmp_path / "new"):
        assert os.listdir(tmp_path / "new") == []


def test_a_folder_that_cannot_be_written_to_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "folder")
    with pytest.raises(NotADirectoryError, match="'.*file' is a file, and a folder is needed"):
        check_folder(tmp_path / "file" / "folder")
    if Path("/proc").is_dir():
        with pytest.raises(OSError, match="/proc/new cannot be written to: "):
            check_folder("/proc/new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_long_name_is_no_problem(tmp_path):
    write(tmp_path / ("x" * 255), "text")
    assert os.listdir(tmp_path) == ["x" * 255]


@posix
def test_links_are_followed_and_modes_are_kept(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "x"
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "real" / "y")
    write(tmp_path / "link", "new")
    write(tmp_path / "dangling", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert target.read_text() == (tmp_path / "real" / "y").read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@posix
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@posix
def test_devices_and_pipes_are_written_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    write("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


KILLED = """
import os, signal, sys
from litgpt.atomic_file import replacing, replacing_folder
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / "x"], check=False)
        assert sum(name.startswith(".x.") for name in os.listdir(tmp_path)) == 1
    (tmp_path / ".x.123.tmp").touch()  # the name in former versions
    others = {".x.tmp", ".x.mine.tmp", "x.tmp", "x.123-00000000.tmp", ".y.123-00000000.tmp", ".xx.123-00000000.tmp"}
    for name in others:
        (tmp_path / name).touch()
    with replacing(tmp_path / "x") as in_use:
        in_use.write_text("first")
        write(tmp_path / "x", "second")
        assert in_use.exists()
    assert set(os.listdir(tmp_path)) == {"x", *others}


def test_a_full_disk_is_called_so_where_torch_writes(tmp_path):
    script = (
        "import resource, signal, sys, torch; from litgpt.atomic_file import replacing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    torch.save({'x': torch.zeros(100_000)}, temporary)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.pth")], capture_output=True, text=True)
    assert "OSError" in result.stderr.splitlines()[-1]
    assert "x.pth could not be written whole: the disk of" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_while_it_writes_a_folder_leaves_the_last_complete_one(tmp_path):
    folder = tmp_path / "final"
    with replacing_folder(folder) as temporary:
        (temporary / "file").write_text("whole")
    if not (child := os.fork()):
        with replacing_folder(folder) as temporary:
            (temporary / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / "file").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2
    with replacing_folder(folder) as temporary:
        (temporary / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (folder / "file").read_text() == "new"


def test_what_killed_writers_of_folders_have_left_is_removed_and_what_they_had_put_aside_is_back(tmp_path):
    for name in (
        ".a-1.01234567.new.tmp",
        ".a-1.01234567.old.tmp",
        ".a-2.01234567.old.tmp",
        "a-2",
        ".b.01234567.new.tmp",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    remove_abandoned_folders(tmp_path, "a-*")
    assert sorted(os.listdir(tmp_path)) == [".b.01234567.new.tmp", "a-1", "a-2"]
    assert (tmp_path / "a-1" / "file").read_text() == ".a-1.01234567.old.tmp"
    assert (tmp_path / "a-2" / "file").read_text() == "a-2"
