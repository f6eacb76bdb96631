"""StableLM of the second generation: StableLM-3B, Zephyr, Stable Code."""

from litgpt.families import llama
from litgpt.families.base import Family, named

STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    structure={"bias": False, "mlp_class_name": "LLaMAMLP"},
    keys=llama.KEYS
    | {"norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual", "attn_bias": "use_qkv_bias"},
    defaults=llama.DEFAULTS
    | {"max_position_embeddings": 4096, "num_key_value_heads": 32, "layer_norm_eps": 1e-5}
    | {"use_parallel_residual": False, "use_qkv_bias": False, "partial_rotary_factor": 0.25},
    expects={"hidden_act": llama.SILU, "qk_layernorm": (False,)},
    outer=llama.OUTER,
    blocks="model.layers",
    block=llama.ATTENTION | llama.MLP,
    read=lambda hf: {"shared_attention_norm": hf.flag("use_parallel_residual", False)},
    models=named(
        {"padded_vocab_size": 50304, "parallel_residual": False},
        ("stabilityai/stablelm-{3b-4e1t,zephyr-3b}", 32, 2560, 32, None, 6912),
        ("stabilityai/stable-code-3b", 32, 2560, 32, None, 6912, {"block_size": 16384}),
    ),
)
FAMILIES = (STABLELM,)
