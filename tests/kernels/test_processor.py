import os
import subprocess
import sys

import pytest

from litgpt.kernels import processor
from litgpt.kernels.library import library


def test_kernels_can_be_restricted_or_left_out(monkeypatch):
    monkeypatch.setattr(processor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(
        processor, "features", lambda: frozenset(["avx2", "fma", "f16c", "avx512bw", "avx512vl", "avx512dq"])
    )
    monkeypatch.delenv("LITGPT_KERNELS", raising=False)
    assert processor.instruction_set().name == "avx512"
    monkeypatch.setenv("LITGPT_KERNELS", "auto")
    assert processor.instruction_set().name == "avx512"
    monkeypatch.setenv("LITGPT_KERNELS", "avx2")
    assert processor.instruction_set().flags == ("-mavx2", "-mfma", "-mf16c")
    monkeypatch.setenv("LITGPT_KERNELS", "0")
    assert processor.instruction_set() is None
    monkeypatch.setenv("LITGPT_KERNELS", "avx3")
    with pytest.raises(ValueError, match="LITGPT_KERNELS='avx3' is not one of auto, avx512, avx2, neon, scalar, 0"):
        processor.instruction_set()


def test_arm_processors_have_kernels_of_their_own(monkeypatch):
    monkeypatch.setattr(processor.platform, "system", lambda: "Linux")
    monkeypatch.delenv("LITGPT_KERNELS", raising=False)
    for features, name in ((["asimd", "asimddp", "bf16"], "neonbf16"), (["asimd"], "neon")):
        monkeypatch.setattr(processor, "features", lambda features=features: frozenset(features))
        assert processor.instruction_set().name == name in processor.VECTORIZED
    monkeypatch.setenv("LITGPT_KERNELS", "neon")
    assert processor.instruction_set().flags == ("-march=armv8-a",)


def test_what_the_processor_lacks_cannot_be_asked_for(monkeypatch):
    monkeypatch.setattr(processor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(processor, "features", lambda: frozenset(["avx2"]))
    monkeypatch.setenv("LITGPT_KERNELS", "avx2")
    with pytest.raises(ValueError, match="this processor has no fma, f16c"):
        processor.instruction_set()


def test_other_systems_have_no_kernels(monkeypatch):
    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    monkeypatch.delenv("LITGPT_KERNELS", raising=False)
    assert processor.instruction_set() is None


def test_cores_count_once_however_many_threads_they_run(monkeypatch):
    blocks = [f"processor\t: {i}\nphysical id\t: 0\ncore id\t\t: {i % 4}\nflags\t\t: avx2" for i in range(8)]
    monkeypatch.setattr(processor.Path, "read_text", lambda *args, **kwargs: "\n\n".join(blocks) + "\n\n")
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda pid: {0, 1, 4, 5, 6})
    assert processor.physical_cores() == 3
    monkeypatch.setattr(processor.Path, "read_text", lambda *args, **kwargs: "processor\t: 0\nBogoMIPS\t: 50\n")
    assert processor.physical_cores() is None


def test_commands_take_one_thread_for_a_core_unless_they_are_told_otherwise():
    script = (
        "from litgpt.kernels import processor\nfrom litgpt.generate.options import ModelOptions\n"
        "print(ModelOptions(threads=7).loading()['threads'], ModelOptions().loading()['threads'])"
    )
    for variable, expected in (({"OMP_NUM_THREADS": "5"}, "7 None"), ({}, f"7 {processor.physical_cores()}")):
        env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run([sys.executable, "-c", script], env=env | variable, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


SCRIPT = "from litgpt.kernels.library import library; import torch; print(library() is not None)"


def loads(says="", **environment):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, says)
    return result.stdout.strip() == "True"


def test_without_kernels_nothing_is_said():
    assert not loads(LITGPT_KERNELS="0")


@pytest.mark.skipif(library() is None, reason="no kernels on this machine")
def test_a_new_process_finds_them_compiled():
    assert loads()
