"""StableLM of the second generation: StableLM-3B, Zephyr, Stable Code."""

from litgpt.families.base import named

MODELS = named(
    {"padded_vocab_size": 50304, "parallel_residual": False, "bias": False, "mlp_class_name": "LLaMAMLP"},
    ("stabilityai/stablelm-{3b-4e1t,zephyr-3b}", 32, 2560, 32, None, 6912),
    ("stabilityai/stable-code-3b", 32, 2560, 32, None, 6912, {"block_size": 16384}),
)
