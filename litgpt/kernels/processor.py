"""The abilities of this machine's processor, and torch's use of them. No other module asks.

`LITGPT_KERNELS` restricts the kernels: `avx512` compiles and runs them without the instructions for bfloat16 and integer
products, `avx2` as for a processor with AVX2 and no more, `neon` as for any 64-bit ARM, `scalar` as for any processor, `0` does without them; unset or `auto` means
the best that the processor has.
"""

import functools
import os
import platform
import re
import subprocess
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
_CPUS = Path("/sys/devices/system/cpu")
VECTORIZED = (
    "avx512bf16",
    "avx512",
    "avx2",
    "neonbf16",
    "neon",
)  # instruction sets that have headers of their own in simd/
# names for the results of `-march=native`, the best first
_NATIVE = {"avx512bf16": (*_AVX512, "avx512_bf16"), "avx512": _AVX512, "avx2": _AVX2}
_APPLE = {"neonbf16": ("-march=armv8.4-a+bf16",), "neon": ("-mcpu=apple-m1",)}  # its compiler knows no native one
_NATIVE |= {"neonbf16": ("asimd", "bf16"), "neon": ("asimd",)}


@functools.cache
def features() -> frozenset[str]:
    """Features of the processor, by Linux's names; empty on other systems than Linux and macOS."""
    return frozenset(
        word for line in _about() if not line.startswith("model name") for word in line.split(":")[1].split()
    )


@functools.cache
def fingerprint() -> str:
    """A text that differs between processors whose compiled code may differ."""
    return "\n".join(_about())


@functools.cache
def _about() -> list[str]:
    if platform.system() == "Darwin":
        return _about_mac(_sysctl())
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features")) and ":" in line})


def _sysctl() -> dict[str, str]:
    """What macOS says about the processor."""
    try:
        done = subprocess.run(["sysctl", "machdep.cpu", "hw"], capture_output=True, text=True)
    except OSError:
        return {}
    return dict(re.findall(r"^([\w.]+): (.*)$", done.stdout, re.MULTILINE))


def _about_mac(values: dict[str, str]) -> list[str]:
    """As the lines of /proc/cpuinfo."""
    words = [
        word for key in ("features", "leaf7_features") for word in values.get(f"machdep.cpu.{key}", "").lower().split()
    ]
    names = {"neon": "asimd", "AdvSIMD": "asimd", "arm.FEAT_DotProd": "asimddp", "arm.FEAT_BF16": "bf16"}
    words += [name for key, name in names.items() if values.get(f"hw.optional.{key}") == "1"]
    return [f"flags: {' '.join(sorted(set(words)))}", f"model name: {values.get('machdep.cpu.brand_string', '')}"]


def physical_cores() -> int | None:
    """Cores of the processors that this process may use, each counted once however many threads it runs (on Apple silicon the
    fast ones); None: unknown."""
    if platform.system() == "Darwin":
        values = _sysctl()
        return int(values.get("hw.perflevel0.physicalcpu") or values.get("hw.physicalcpu") or 0) or None
    try:
        cpus = [_CPUS / f"cpu{number}" for number in os.sched_getaffinity(0)]
        return len({(cpu / "topology" / "thread_siblings_list").read_text() for cpu in cpus})
    except (OSError, AttributeError):
        return None


def instruction_set() -> InstructionSet | None:
    """The target for the kernels; None if they are disabled or impossible on this system.

    Raises:
        ValueError: if `LITGPT_KERNELS` is not one of its values, or asks for what the processor lacks.
    """
    choice = os.environ.get("LITGPT_KERNELS") or "auto"
    if choice not in ("auto", "0", *RESTRICTED):
        raise ValueError(f"LITGPT_KERNELS={choice!r} is not one of auto, {', '.join(RESTRICTED)}, 0")
    if choice == "0" or platform.system() not in ("Linux", "Darwin"):
        return None
    if choice == "auto":
        known = (name for name, needed in _NATIVE.items() if features().issuperset(needed))
        name = next(known, platform.machine())
        own = _APPLE if platform.system() == "Darwin" else {}  # Intel's have other names
        return InstructionSet(name, own.get(name, ("-march=native",)))
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


def has_tiles() -> bool:
    """Whether the processor has AMX, which torch uses in matrix products and the kernels do not."""
    return "amx_bf16" in features()


def mkl_forgoes_avx512() -> bool:
    """Whether the processor has AVX-512 and MKL does not use it: it does so on Intel's only."""
    return "avx512f" in features() and not any("Intel" in line for line in _about() if line.startswith("model name"))
