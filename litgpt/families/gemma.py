"""Gemma, Gemma 2 and Gemma 3 (text)."""

from litgpt.families import llama
from litgpt.families.base import named

_STRUCTURE = llama.STRUCTURE | {"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True}
_POST_NORMS = _STRUCTURE | {"post_attention_norm": True, "post_mlp_norm": True}
_GEMMA = _STRUCTURE | {"vocab_size": 256000, "padding_multiple": 64}
_GEMMA_2 = _POST_NORMS | {
    "vocab_size": 256000,
    "block_size": 8192,
    "head_size": 256,
    "attention_scores_scalar": 256,
    "sliding_window_size": 4096,
    "sliding_window_indices": "10",
    "attention_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_3 = _POST_NORMS | {
    "vocab_size": 262144,
    "block_size": 131072,
    "head_size": 256,
    "attention_scores_scalar": 256,
    "sliding_window_size": 1024,
    "sliding_window_indices": "111110",
    "norm_qk": True,
    "rope_base": 1000000,
    "rope_local_base_freq": 10000,
    "rope_indices": "111110",
    "rope_adjustments": {"factor": 8.0},
}

MODELS = (
    named(
        _GEMMA,
        ("google/gemma-2b{,-it}=Gemma-2b{,-it}", 18, 2048, 8, 1, 16384),
        (
            "google/{gemma-7b,gemma-7b-it,codegemma-7b-it}={Gemma-7b,Gemma-7b-it,CodeGemma-7b-it}",
            28,
            3072,
            16,
            None,
            24576,
            {"head_size": 256},
        ),
    )
    | named(
        _GEMMA_2,
        ("google/gemma-2-2b{,-it}=Gemma-2-2b{,-it}", 26, 2304, 8, 4, 9216),
        ("google/gemma-2-9b{,-it}=Gemma-2-9b{,-it}", 42, 3584, 16, 8, 14336),
        (
            "google/gemma-2-27b{,-it}=Gemma-2-27b{,-it}",
            46,
            4608,
            32,
            16,
            36864,
            {"head_size": 128, "attention_scores_scalar": 144},
        ),
    )
    | named(
        _GEMMA_3,
        (
            "google/gemma-3-1b-it=Gemma-3-1b-it",
            26,
            1152,
            4,
            1,
            6912,
            {"sliding_window_size": 512, "rope_adjustments": None},
        ),
        ("google/gemma-3-4b-it=Gemma-3-4b-it", 34, 2560, 8, 4, 10240),
        ("google/gemma-3-12b-it=Gemma-3-12b-it", 48, 3840, 16, 8, 15360),
        (
            "google/gemma-3-27b-it=Gemma-3-27b-it",
            62,
            5376,
            32,
            16,
            21504,
            {"head_size": 128, "attention_scores_scalar": 168},
        ),
    )
)
