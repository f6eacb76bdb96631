"""The compiled kernels: several libraries, and the types of their arguments.

Compiling takes a C++ compiler. Without one everything works as well, by torch's own operations, only slower.
"""

import contextlib
import ctypes
import functools

from litgpt.kernels import processor

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_RUN_LAYERS = [_POINTER, _POINTER, _COUNT] + [_POINTER] * 5 + [_COUNT] * 2 + [_POINTER, _COUNT]
_SCORING = {"run_tails": [_POINTER] * 12, "run_looks": [_POINTER, _COUNT]}
_RETURN_INTEGERS = ("multiplies_fast", "run_layers")
_SIGNATURES = {  # by the names of libraries in build.py
    "KERNELS": _SCORING
    | {
        "linear_blocked": [_POINTER] * 4 + [_COUNT] * 3,
        "linear_plain": [_POINTER] * 4 + [_COUNT] * 3,
        "linear_int8": [_POINTER] * 5 + [_COUNT] * 3,
        "linear_int4": [_POINTER] * 6 + [_COUNT] * 4,
        "gated_mlp_blocked": [_POINTER] * 4 + [_COUNT] * 4 + [ctypes.c_int],
        "run_layers": _RUN_LAYERS,
        "multiplies_fast": [],
        "rms_norm": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2,
        "attend_causally": [_POINTER] * 5 + [_COUNT] * 7 + [_POINTER] + [_FLOAT] * 2,
        "see_weights": [_POINTER] * 7 + [_COUNT] * 6 + [_POINTER] + [_FLOAT] * 2 + [ctypes.c_int],
        "move_slots": [_POINTER] * 3 + [_COUNT] * 5,
        "find_likeliest": [_POINTER] * 2 + [_COUNT] * 2,
        "choose_slots": [_POINTER] * 2 + [_COUNT] * 5,
        "attend": [_POINTER] * 5 + [_COUNT] + [_POINTER] * 3 + [_COUNT] * 6 + [_POINTER] + [_FLOAT] * 2,
        "use_encoded_split": [_POINTER],
    },
    "ENCODED": {"attend_encoded_split": [_POINTER] * 4},
    "FLOAT32": {"run_layers": _RUN_LAYERS} | _SCORING,
    "TRAINING": {
        "attend_rows": [_POINTER] * 5 + [_COUNT] * 4 + [_POINTER] * 3 + [_FLOAT, ctypes.c_int],
        "attend_rows_backward": [_POINTER] * 10 + [_COUNT] * 4 + [_POINTER] * 3 + [_FLOAT, ctypes.c_int],
        "multiply_matrices": [_POINTER] * 4 + [_COUNT] * 7 + [ctypes.c_int],
        "run_block": [_POINTER] * 2,
        "run_block_backward": [_POINTER] * 4,
        "gate_values": [_POINTER] * 3 + [_COUNT] + [ctypes.c_int] * 2,
        "gate_values_backward": [_POINTER] * 5 + [_COUNT] + [ctypes.c_int] * 2,
        "drop_values": [_POINTER] * 2 + [_COUNT] * 2 + [ctypes.c_double, ctypes.c_int],
        "norm_values": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2 + [ctypes.c_int],
        "norm_values_backward": [_POINTER] * 6 + [_COUNT] * 2 + [_FLOAT] * 2 + [ctypes.c_int],
        "rotate_values": [_POINTER] * 4 + [_COUNT] * 6 + [ctypes.c_int] * 2,
        "next_token_losses": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT, ctypes.c_int],
    },
}


@functools.cache
def compile_ahead(which: str = "KERNELS") -> None:
    """Compile a library beside other work, if it has to be: the sooner this is called, the less its first user waits. It waits
    for libraries that were asked for before."""
    with contextlib.suppress(ValueError):  # which `library` raises
        target = processor.instruction_set()
        if target is not None:
            from litgpt.kernels import build

            build.compile_ahead(target, getattr(build, which))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels of inference; None where they are impossible or disabled (`litgpt.kernels.processor`)."""
    return _library("KERNELS")


# The others are compiled by whoever needs one first, and None as `library` is.


@functools.cache
def encoded_library() -> ctypes.CDLL | None:
    """Attention over encoded keys, by which `library` serves caches in fewer bits from now on."""
    found = library() and _library("ENCODED")
    if found is not None:
        library().use_encoded_split(ctypes.cast(found.attend_encoded_split, _POINTER))
    return found


@functools.cache
def float32_library() -> ctypes.CDLL | None:
    """`run_layers`, and what scores tokens, for models in float32."""
    return library() and _library("FLOAT32")


@functools.cache
def training_library() -> ctypes.CDLL | None:
    """The kernels of training."""
    return library() and _library("TRAINING")


def _library(which: str) -> ctypes.CDLL | None:
    target = processor.instruction_set()
    if target is None:
        return None
    import torch  # noqa: F401  # whose OpenMP the kernels use

    from litgpt.kernels import build  # imports modules that only Linux has

    return build.kernels_for(target, functools.partial(_load, which), what=getattr(build, which))


def _load(which: str, path: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(path)
    for name, arguments in _SIGNATURES[which].items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, ctypes.c_int if name in _RETURN_INTEGERS else None
    return loaded
