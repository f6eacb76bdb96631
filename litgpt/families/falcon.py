"""Falcon of the first generation: 7B, 40B, 180B."""

from litgpt.families.base import named

MODELS = named(
    {
        "block_size": 2048,
        "vocab_size": 65024,
        "padded_vocab_size": 65024,
        "rotary_percentage": 1.0,
        "bias": False,
    },
    ("tiiuae/falcon-7b{,-instruct}", 32, 4544, 71, 1, None, {"shared_attention_norm": True}),
    ("tiiuae/falcon-40b{,-instruct}", 60, 8192, 128, 8, None),
    ("tiiuae/falcon-180B{,-chat}", 80, 14848, 232, 8, None),
)
