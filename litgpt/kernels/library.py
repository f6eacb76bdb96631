"""Compiles `cpu.cpp` and what it includes for this machine, once, and loads it.

That takes seconds and a C++ compiler. Without one everything works as well, by torch's own operations, only slower.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "cpu.cpp"
# sums may be reordered, for vectors of them; infinities and NaN keep their meaning
FLAGS = "-std=c++17 -O3 -march=native -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros"

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "linear_blocked": [_POINTER] * 4 + [_COUNT] * 3,
    "linear_plain": [_POINTER] * 4 + [_COUNT] * 3,
    "linear_int8": [_POINTER] * 5 + [_COUNT] * 3,
    "linear_int4": [_POINTER] * 6 + [_COUNT] * 4,
    "gated_mlp_blocked": [_POINTER] * 4 + [_COUNT] * 4 + [ctypes.c_int],
    "run_layers": [_POINTER, _POINTER, _COUNT] + [_POINTER] * 4 + [_COUNT] * 2 + [_POINTER, _COUNT],
    "multiplies_fast": [],
    "rms_norm": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2,
    "attend_causally": [_POINTER] * 5 + [_COUNT] * 7 + [_POINTER] + [_FLOAT] * 2,
    "attend": [_POINTER] * 6 + [_COUNT] * 6 + [_POINTER] + [_FLOAT] * 2,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None: no compiler, another system than Linux, or `LITGPT_KERNELS=0`."""
    if os.environ.get("LITGPT_KERNELS") == "0" or platform.system() != "Linux":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, ctypes.c_int if name == "multiplies_fast" else None
    return loaded


def _compiled(compiler: str) -> Path:
    """The shared library of this source, compiler and processor; compiled if it is not there yet."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    source = b"".join(path.read_bytes() for path in (SOURCE, *sorted(FOLDER.glob("*.h"))))
    key = hashlib.sha256(b"\0".join((source, FLAGS.encode(), version, _processor()))).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litgpt"
    path = folder / f"kernels-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            print("Compiling kernels for this processor, once, which takes seconds", file=sys.stderr, flush=True)
            unlinked, linked = Path(temporary, "kernels.o"), Path(temporary, "kernels.so")
            run = functools.partial(subprocess.run, capture_output=True, check=True, timeout=300)
            run([compiler, *FLAGS.split(), "-c", str(SOURCE), "-o", str(unlinked)])
            # not linked with OpenMP: the threads are to be those of torch, whose library is loaded already
            run([compiler, "-shared", str(unlinked), "-o", str(linked)])
            linked.replace(path)
    return path


def _processor() -> bytes:
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}))
