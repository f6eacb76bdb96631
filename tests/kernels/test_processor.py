import os
import subprocess
import sys

import pytest
import torch

from litgpt.generate.options import ModelOptions
from litgpt.kernels import processor
from litgpt.kernels.library import library
from litgpt.kernels.toolchain import toolchain


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
    monkeypatch.setattr(processor.platform, "system", lambda: "Windows")
    monkeypatch.delenv("LITGPT_KERNELS", raising=False)
    assert processor.instruction_set() is None


M1 = """hw.optional.neon: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_BF16: 0
hw.physicalcpu: 8
hw.perflevel0.physicalcpu: 4
machdep.cpu.brand_string: Apple M1
"""
INTEL = """hw.physicalcpu: 6
machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz
machdep.cpu.features: FPU SSE4.2 F16C FMA AVX1.0
machdep.cpu.leaf7_features: AVX2 BMI2
"""
MACS = {
    "M1": (M1, "neon", ("-mcpu=apple-m1",), 4),
    "M2": (M1.replace("BF16: 0", "BF16: 1"), "neonbf16", ("-march=armv8.4-a+bf16",), 4),
    "Intel": (INTEL, "avx2", ("-march=native",), 6),
}


@pytest.mark.parametrize(("says", "name", "flags", "cores"), MACS.values(), ids=MACS)
def test_on_macos_the_processor_is_asked_by_sysctl(monkeypatch, tmp_path, says, name, flags, cores):
    command = tmp_path / "sysctl"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{says}END\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    monkeypatch.delenv("LITGPT_KERNELS", raising=False)
    for function in (processor.features, processor.fingerprint, processor._about):
        monkeypatch.setattr(processor, function.__name__, function.__wrapped__)
    assert (processor.instruction_set().name, processor.instruction_set().flags) == (name, flags)
    assert processor.physical_cores() == cores
    assert says.split("brand_string: ")[1].splitlines()[0] in processor.fingerprint()


def test_on_macos_units_are_compiled_for_the_openmp_of_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    found = toolchain()
    flags = found.compile_unit(["-mcpu=apple-m1"], tmp_path / "x.cpp", tmp_path / "x.o")
    assert flags[-5:] == ["-mcpu=apple-m1", "-c", str(tmp_path / "x.cpp"), "-o", str(tmp_path / "x.o")]
    assert flags[flags.index("-fopenmp") - 1] == "-Xclang"
    assert not any("cost-model" in flag for flag in flags)
    assert "-Wl,-undefined,dynamic_lookup" in found.link_units([tmp_path / "x.o"], tmp_path / "x.so")
    monkeypatch.delenv("CXX", raising=False)
    for status, compiler in ((2, None), (0, str(tmp_path / "clang++"))):
        for name, code in (("xcode-select", status), ("clang++", 0)):
            (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert found.compiler() == compiler
    assert found.missing() == "there is no compiler 'clang++' (xcode-select --install installs it)"


def test_cores_count_once_however_many_threads_they_run(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "_CPUS", tmp_path)
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda pid: {0, 1, 4, 5, 6})
    assert processor.physical_cores() is None
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    assert processor.physical_cores() == 3


def test_commands_take_one_thread_for_a_core_unless_they_are_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(processor, "physical_cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert (ModelOptions(threads=7).loading()["threads"], ModelOptions().loading()["threads"]) == (7, None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (ModelOptions(threads=7).loading()["threads"], ModelOptions().loading()["threads"]) == (7, 3)


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
