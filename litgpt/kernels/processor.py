"""The abilities of this machine's processor, and torch's use of them. No other module asks.

`LITGPT_KERNELS` restricts the kernels: `avx512` compiles and runs them without the instructions for bfloat16 and integer
products, `avx2` as for a processor with AVX2 and no more, `neon` as for any 64-bit ARM, `scalar` as for any processor, `0` does without them; unset or `auto` means
the best that the processor has.
"""

import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InstructionSet:
    """The target of the compiler.

    Attributes:
        name: part of the file name of the library.
        flags: for the compiler.
        features: required features, by the processor's names.
    """

    name: str
    flags: tuple[str, ...]
    features: tuple[str, ...] = ()


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512bw", "avx512vl", "avx512dq")
RESTRICTED = {
    "avx512": InstructionSet("avx512", tuple(f"-m{name}" for name in _AVX2 + _AVX512), _AVX2 + _AVX512),
    "avx2": InstructionSet("avx2", tuple(f"-m{name}" for name in _AVX2), _AVX2),
    "neon": InstructionSet("neon", ("-march=armv8-a",), ("asimd",)),
    "scalar": InstructionSet("scalar", ("-DLITGPT_SCALAR",)),
}
VECTORIZED = (
    "avx512bf16",
    "avx512",
    "avx2",
    "neonbf16",
    "neon",
)  # instruction sets that have headers of their own in simd/
# names for the results of `-march=native`, the best first
_NATIVE = {"avx512bf16": (*_AVX512, "avx512_bf16"), "avx512": _AVX512, "avx2": _AVX2}
_NATIVE |= {"neonbf16": ("asimd", "bf16"), "neon": ("asimd",)}


@functools.cache
def features() -> frozenset[str]:
    """Features of the processor, by Linux's names; empty on other systems."""
    return frozenset(
        word for line in _about() if not line.startswith("model name") for word in line.split(":")[1].split()
    )


@functools.cache
def fingerprint() -> str:
    """A text that differs between processors whose compiled code may differ."""
    return "\n".join(_about())


@functools.cache
def _about() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features")) and ":" in line})


def physical_cores() -> int | None:
    """Cores of the processors that this process may use, each counted once however many threads it runs; None: unknown."""
    try:
        blocks = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")
    except OSError:
        return None
    cpus = [dict(re.findall(r"^(\S[^\t:]*)\t*: ?(.*)$", block, re.MULTILINE)) for block in blocks]
    cores = {
        (cpu.get("physical id"), cpu["core id"])
        for cpu in cpus
        if "core id" in cpu and int(cpu["processor"]) in os.sched_getaffinity(0)
    }
    return len(cores) or None


def instruction_set() -> InstructionSet | None:
    """The target for the kernels; None if they are disabled or impossible on this system.

    Raises:
        ValueError: if `LITGPT_KERNELS` is not one of its values, or asks for what the processor lacks.
    """
    choice = os.environ.get("LITGPT_KERNELS") or "auto"
    if choice not in ("auto", "0", *RESTRICTED):
        raise ValueError(f"LITGPT_KERNELS={choice!r} is not one of auto, {', '.join(RESTRICTED)}, 0")
    if choice == "0" or platform.system() != "Linux":
        return None
    if choice == "auto":
        known = (name for name, needed in _NATIVE.items() if features().issuperset(needed))
        return InstructionSet(next(known, platform.machine()), ("-march=native",))
    chosen = RESTRICTED[choice]
    if missing := [name for name in chosen.features if name not in features()]:
        raise ValueError(f"LITGPT_KERNELS={choice}: this processor has no {', '.join(missing)}")
    return chosen


@functools.cache
def torch_multiplies_bfloat16() -> bool:
    """Whether torch's matrix products on CPU compute in bfloat16, and packed weights are there for them."""
    import torch  # here, since kernels are compiled while it is imported

    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def mkl_forgoes_avx512() -> bool:
    """Whether the processor has AVX-512 and MKL does not use it: it does so on Intel's only."""
    return "avx512f" in features() and not any("Intel" in line for line in _about() if line.startswith("model name"))
