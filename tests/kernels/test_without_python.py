"""The kernels in a program of their own (check.cpp): for ARM under emulation, and with the compiler's sanitizers.

LITGPT_TEST_SANITIZERS=1 adds the sanitizers, clang and ARM with bfloat16, which take minutes to compile.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from litgpt.kernels import build, processor, toolchain

CROSS, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
slow = pytest.mark.skipif(os.environ.get("LITGPT_TEST_SANITIZERS") != "1", reason="LITGPT_TEST_SANITIZERS=1 is not set")
CHECK = Path(__file__).with_name("check.cpp")


def program(compiler: str, folder: Path, flags: list[str], kind: toolchain.Toolchain = toolchain.LINUX) -> Path:
    """The compiled program; all units at once."""
    common = [*kind.flags, f"-I{build.SOURCES}", *flags]
    units = dict.fromkeys(build.KERNELS.units + build.ENCODED.units + build.TRAINING.units)
    sources = [*(build.SOURCES / f"{unit}.cpp" for unit in units), CHECK]

    def run(*arguments: object) -> None:
        done = subprocess.run([compiler, *common, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(lambda source: run("-c", source, "-o", folder / f"{source.stem}.o"), sources))
    run(*(folder / f"{source.stem}.o" for source in sources), "-o", folder / "check")
    return folder / "check"


def assert_no_differences(command: list[object], **environment: str) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 differences\n", "")


@pytest.mark.skipif(not (EMULATOR and shutil.which(CROSS)), reason="no cross compiler and emulator for ARM")
@pytest.mark.skipif("LITGPT_KERNELS" in os.environ, reason="the tests of another instruction set")
@pytest.mark.parametrize("machine", ["armv8-a", pytest.param("armv8.2-a+bf16", marks=slow)])
def test_neon(tmp_path, machine):
    check = program(CROSS, tmp_path, [f"-march={machine}", "-O1", "-static"])
    assert_no_differences([EMULATOR, "-cpu", "max", check, 1, 6], OMP_NUM_THREADS="2")


@slow
@pytest.mark.skipif(platform.system() != "Linux", reason="no kernels")
@pytest.mark.parametrize("name", ["auto", *processor.RESTRICTED])
def test_sanitizers_find_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LITGPT_KERNELS", name)
    try:
        target = processor.instruction_set()
    except ValueError as error:
        pytest.skip(str(error))
    sanitize = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=alignment"]
    check = program("g++", tmp_path, [*target.flags, *sanitize])
    assert_no_differences([check, 1, 40], OMP_NUM_THREADS="2")


@slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang")
@pytest.mark.parametrize("openmp", [True, False])
def test_clang_with_the_flags_for_macos(tmp_path, openmp):
    """Its OpenMP is linked here, where torch's is another; or left out."""
    flags = [*processor.instruction_set().flags, "-Wno-pass-failed", *(["-fopenmp"] if openmp else [])]
    kind = toolchain.MACOS
    if not openmp:
        kind = replace(kind, flags=tuple(flag for flag in kind.flags if flag not in ("-Xclang", "-fopenmp")))
    assert_no_differences([program("clang++", tmp_path, flags, kind), 1, 40], OMP_NUM_THREADS="2")


@slow
@pytest.mark.skipif(
    not (EMULATOR and shutil.which(CROSS) and shutil.which("clang++")), reason="no clang, or no emulator"
)
@pytest.mark.parametrize("machine", ["armv8-a", "armv8.4-a+bf16"])
def test_clang_for_arm(tmp_path, machine):
    kind = replace(toolchain.MACOS, flags=tuple(x for x in toolchain.MACOS.flags if x not in ("-Xclang", "-fopenmp")))
    check = program("clang++", tmp_path, ["--target=aarch64-linux-gnu", f"-march={machine}", "-static"], kind)
    assert_no_differences([EMULATOR, "-cpu", "max", check, 1, 6])
