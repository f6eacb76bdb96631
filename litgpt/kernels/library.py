"""The compiled kernels, and the types of their arguments.

Compiling takes a C++ compiler. Without one everything works as well, by torch's own operations, only slower.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterable

from litgpt.kernels import processor

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
    "see_weights": [_POINTER] * 6 + [_COUNT] * 6 + [_POINTER] + [_FLOAT] * 2 + [ctypes.c_int],
    "move_slots": [_POINTER] * 3 + [_COUNT] * 5,
    "attend_rows": [_POINTER] * 5 + [_COUNT] * 4 + [_POINTER] * 2 + [_FLOAT, ctypes.c_int],
    "attend_rows_backward": [_POINTER] * 10 + [_COUNT] * 4 + [_POINTER] * 2 + [_FLOAT, ctypes.c_int],
    "multiply_matrices": [_POINTER] * 4 + [_COUNT] * 7 + [ctypes.c_int],
    "gate_values": [_POINTER] * 3 + [_COUNT] + [ctypes.c_int] * 2,
    "gate_values_backward": [_POINTER] * 5 + [_COUNT] + [ctypes.c_int] * 2,
    "drop_values": [_POINTER] * 2 + [_COUNT] * 2 + [ctypes.c_double, ctypes.c_int],
    "norm_values": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2 + [ctypes.c_int],
    "norm_values_backward": [_POINTER] * 6 + [_COUNT] * 2 + [_FLOAT] * 2 + [ctypes.c_int],
    "rotate_values": [_POINTER] * 4 + [_COUNT] * 5 + [ctypes.c_int] * 2,
    "next_token_losses": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT, ctypes.c_int],
    "attend": [_POINTER] * 5 + [_COUNT] + [_POINTER] * 3 + [_COUNT] * 6 + [_POINTER] + [_FLOAT] * 2,
}


@functools.cache
def compile_ahead() -> None:
    """Compile the kernels beside other work, if they have to be: the sooner this is called, the less `library` waits."""
    with contextlib.suppress(ValueError):  # which `library` raises
        target = processor.instruction_set()
        if target is not None:
            from litgpt.kernels import build

            build.compile_ahead(target)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are impossible or disabled (`litgpt.kernels.processor`)."""
    return _library("KERNELS", tuple(_SIGNATURES))


@functools.cache
def float32_library() -> ctypes.CDLL | None:
    """`run_layers` for models in float32; None as for `library`."""
    return library() and _library("FLOAT32", ("run_layers",))


def _library(which: str, functions: tuple[str, ...]) -> ctypes.CDLL | None:
    target = processor.instruction_set()
    if target is None:
        return None
    import torch  # noqa: F401  # whose OpenMP the kernels use

    from litgpt.kernels import build  # imports modules that only Linux has

    return build.kernels_for(target, functools.partial(_load, functions=functions), what=getattr(build, which))


def _load(path: str, functions: Iterable[str] = tuple(_SIGNATURES)) -> ctypes.CDLL:
    loaded = ctypes.CDLL(path)
    for name in functions:
        function, arguments = getattr(loaded, name), _SIGNATURES[name]
        function.argtypes, function.restype = arguments, ctypes.c_int if name == "multiplies_fast" else None
    return loaded
