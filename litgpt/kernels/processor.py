"""What this machine's processor, and what torch makes of it, can do: the one place that asks.

`LITGPT_KERNELS` restricts the kernels: `avx2` compiles and runs them as for a processor with AVX2 and no more, `0` does
without them; unset or `auto` means all that the processor has.
"""

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class InstructionSet:
    """What kernels are compiled for.

    Attributes:
        name: part of the file name of what is compiled.
        flags: for the compiler.
        features: the processor's names for what they need.
    """

    name: str
    flags: tuple[str, ...]
    features: tuple[str, ...] = ()


RESTRICTED = {"avx2": InstructionSet("avx2", ("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma", "f16c"))}
# names for what `-march=native` comes to, the best first
_NATIVE = {
    "avx512bf16": ("avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
    "avx512": ("avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma", "f16c"),
}


@functools.cache
def features() -> frozenset[str]:
    """What the processor says that it has, in Linux's words; empty on other systems."""
    return frozenset(
        word for line in _about() if not line.startswith("model name") for word in line.split(":")[1].split()
    )


@functools.cache
def fingerprint() -> str:
    """Tells processors apart whose compiled code may differ."""
    return "\n".join(_about())


@functools.cache
def _about() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features")) and ":" in line})


def instruction_set() -> InstructionSet | None:
    """What the kernels are to be compiled for; None: there are to be none, or cannot be on this system.

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
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
