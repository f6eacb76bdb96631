import os
import subprocess
import sys

import pytest

from litgpt.kernels.library import library

SCRIPT = "from litgpt.kernels.library import library; import torch; print(library() is not None)"


def loads(tmp_path, says="", **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == says
    return result.stdout.strip() == "True"


@pytest.mark.parametrize("environment", [{"LITGPT_KERNELS": "0"}, {"CXX": "no-such-compiler"}, {"CXX": "false"}])
def test_without_a_compiler_there_are_none_and_nothing_is_said(tmp_path, environment):
    assert not loads(tmp_path, **environment)
    assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.skipif(library() is None, reason="no kernels on this machine")
def test_they_are_compiled_once(tmp_path):
    assert loads(tmp_path, "Compiling kernels for this processor, once, which takes seconds\n")
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
    written = path.stat().st_mtime_ns
    assert loads(tmp_path)
    assert path.stat().st_mtime_ns == written
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@pytest.mark.skipif(library() is None, reason="no kernels on this machine")
def test_a_folder_that_cannot_be_written_means_none(tmp_path):
    (tmp_path / "file").write_text("")
    assert not loads(tmp_path / "file")
