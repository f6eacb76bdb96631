"""Phi-1.5 and Phi-2, and the Llama-like Phi-3 and Phi-4."""

from litgpt.families import llama
from litgpt.families.base import named

_PHI = {
    "vocab_size": 50257,
    "padded_vocab_size": 51200,
    "block_size": 2048,
    "shared_attention_norm": True,
    "lm_head_bias": True,
    "gelu_approximate": "tanh",
}
_PHI_3 = llama.STRUCTURE | {"vocab_size": 32000, "padded_vocab_size": 32064}
_PHI_4 = llama.STRUCTURE | {"vocab_size": 100352, "padded_vocab_size": 100352}
_PHI_4_MINI = llama.STRUCTURE | {
    "vocab_size": 200019,
    "padded_vocab_size": 200064,
    "block_size": 131072,
    "rotary_percentage": 0.75,
    "sliding_window_size": 262145,
}
_128K = {"block_size": 131072, "sliding_window_size": 262145}

MODELS = (
    named(
        _PHI,
        ("microsoft/phi-1_5", 24, 2048, 32, None, None, {"rotary_percentage": 0.5}),
        ("microsoft/phi-2", 32, 2560, 32, None, None, {"rotary_percentage": 0.4}),
    )
    | named(
        _PHI_3,
        ("microsoft/Phi-3-mini-4k-instruct", 32, 3072, 32, None, 8192, {"sliding_window_size": 2048}),
        ("microsoft/Phi-3-mini-128k-instruct", 32, 3072, 32, None, 8192, _128K),
        ("microsoft/Phi-3.5-mini-instruct", 32, 3072, 32, None, 8192),
    )
    | named(
        _PHI_4,
        ("microsoft/phi-4", 40, 5120, 40, 10, 17920, {"block_size": 16384, "rope_base": 250000}),
        (
            "microsoft/Phi-4-reasoning{,-plus}",
            *(40, 5120, 40, 10, 17920),
            {"block_size": 32768, "rope_base": 500000},
        ),
    )
    | named(_PHI_4_MINI, ("microsoft/Phi-4-mini-{instruct,reasoning}", 32, 3072, 24, 8, 8192))
)
