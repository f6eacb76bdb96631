"""The arguments of `run_layers`, `run_tails`, `run_looks` and `run_block`, as in layers.h, scored_cache.h and block.h."""

import ctypes

import torch

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

BLOCKED, INT8, INT4, PLAIN = range(4)  # kinds of weights


class Weight(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("kind", "K", "N", "group")),
        *((name, _POINTER) for name in ("w", "scale", "minimum", "bias")),
        ("rank", _COUNT),
        *((name, _POINTER) for name in ("a", "b")),
    ]


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("E", "H", "G", "D", "I", "rope_n", "interleave", "activation", "norm_all_heads")),
        *((name, _FLOAT) for name in ("eps", "norm_offset", "scale", "cap", "attention_factor", "mlp_factor")),
        ("final_norm", _POINTER),
    ]


class Vectors(ctypes.Structure):
    """Encoded keys or values, (B, G, slots, ...)."""

    _fields_ = [
        *((name, _POINTER) for name in ("codes", "scales")),
        *((name, _COUNT) for name in ("kind", "rotated")),
        *((name, _COUNT * 3) for name in ("strides", "scale_strides")),
        *((name, _COUNT) for name in ("unit", "group")),
    ]

    @classmethod
    def of(cls, kind: int, rotated: bool, codes: torch.Tensor, scales: torch.Tensor) -> "Vectors":
        strides = ((_COUNT * 3)(*x.stride()[:3]) for x in (codes, scales))
        return cls(codes.data_ptr(), scales.data_ptr(), kind, rotated, *strides, 1)

    @property
    def by_vector(self) -> bool:
        """Whether each vector is encoded on its own, in a way that the kernels read."""
        return self.kind in (1, 2, 3)


class Layer(ctypes.Structure):
    _fields_ = [
        *(
            (name, _POINTER)
            for name in ("norm_1", "norm_q", "norm_k", "post_attention_norm", "norm_2", "post_mlp_norm")
        ),
        *((name, _POINTER) for name in ("sinks", "keys", "values")),
        *((name, _COUNT) for name in ("row_stride", "head_stride")),
        ("queries", _POINTER),
        *((name, _COUNT) for name in ("query_row_stride", "query_head_stride")),
        *((name, _POINTER) for name in ("positions", "sums", "first_slots", "extra_slots")),
        *((name, _COUNT) for name in ("rope", "plan")),
        *((name, Weight) for name in ("qkv", "proj", "gate", "up", "down")),
        ("encoded", Vectors * 2),
    ]


class Segment(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("first", "T", "row", "key", "N", "window")),
        *((name, _POINTER) for name in ("kept", "slots")),
        ("n_kept", _COUNT),
        ("query_slots", _POINTER),
        ("n_queries", _COUNT),
        ("old", _POINTER),
        *((name, _COUNT) for name in ("n_old", "pinned", "sealed", "seal_from", "begin", "newest")),
    ]


class TailSegment(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("first", "T", "row")),
        *((name, _POINTER) for name in ("held", "shift", "steps")),
        *((name, _COUNT) for name in ("n_steps", "n_sink", "recent", "kept", "pool", "n_queries")),
    ]


class SlotBuffer(ctypes.Structure):
    _fields_ = [("start", _POINTER), ("bytes", _COUNT)]

    @classmethod
    def of(cls, buffer: torch.Tensor) -> "SlotBuffer":
        """Of a contiguous buffer (rows, G, slots, ...)."""
        return cls(buffer.data_ptr(), buffer.element_size() * buffer.shape[3:].numel())


class ScoredCache(ctypes.Structure):
    """A cache whose policy scores tokens by attention weights."""

    _fields_ = [
        *((name, _COUNT) for name in ("H", "G", "D", "C", "n_sink", "recent", "kept", "pool", "max_queries")),
        *((name, _FLOAT) for name in ("scale", "cap")),
        *((name, _POINTER) for name in ("sinks", "queries", "positions", "sums")),
        ("slots", SlotBuffer * 4),
        ("encoded", Vectors),
    ]


class Look(ctypes.Structure):
    """A policy looks at rows of a cache."""

    _fields_ = [
        ("cache", ScoredCache),
        ("B", _COUNT),
        *((name, _POINTER) for name in ("rows", "held", "shift")),
        *((name, _COUNT) for name in ("filled", "observed", "n_queries", "evicts")),
    ]


class StepPlan(ctypes.Structure):
    _fields_ = [
        ("rows", _POINTER),
        ("slots", _POINTER),
        *((name, _COUNT) for name in ("slots_by_row", "first", "N")),
        ("query_slots", _POINTER),
        *((name, _COUNT) for name in ("query_slots_by_row", "n_queries")),
        ("bias", _POINTER),
        ("bias_strides", _COUNT * 2),
        ("segments", _POINTER),
        ("n_segments", _COUNT),
        ("sealed", _POINTER),
        ("newest", _COUNT),
        ("tails", _POINTER),
        ("n_tails", _COUNT),
    ]


class Rope(ctypes.Structure):
    _fields_ = [("cos", _POINTER), ("sin", _POINTER), ("row_stride", _COUNT)]


class Ends(ctypes.Structure):
    """What a decode step computes before its first and after its last layer."""

    _fields_ = [("ids", _POINTER), ("table", _POINTER), ("V", _COUNT), ("head", Weight), ("logits", _POINTER)]


class Norm(ctypes.Structure):
    _fields_ = [("eps", _FLOAT), ("offset", _FLOAT)]


class Block(ctypes.Structure):
    """A layer that is trained."""

    _fields_ = [
        *((name, _COUNT) for name in ("T", "E", "H", "G", "D", "I", "activation", "window", "n_rows")),
        ("ends", ctypes.c_char_p),
        ("numbers", Norm * 2),
        ("scale", _FLOAT),
        *((name, _POINTER) for name in ("cos", "sin")),
        ("weights", _POINTER * 7),
        ("kept", _POINTER * 7),
    ]


class Gradient(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("adds", _COUNT)]


BlockGradients = Gradient * 7


def address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
