"""Phi-1.5 and Phi-2, and the Llama-like Phi-3 and Phi-4."""

from litgpt.families import llama, neox
from litgpt.families.base import Family, named

_PHI = {"vocab_size": 50257, "padded_vocab_size": 51200, "block_size": 2048, "gelu_approximate": "tanh"}
_PHI_3 = {"vocab_size": 32000, "padded_vocab_size": 32064}
_PHI_4 = {"vocab_size": 100352, "padded_vocab_size": 100352}
_128K = {"block_size": 131072, "sliding_window_size": 262145}
_PHI_4_MINI = _128K | {"vocab_size": 200019, "padded_vocab_size": 200064, "rotary_percentage": 0.75}
_REASONING = {"block_size": 32768, "rope_base": 500000}

_PHI_3_MODELS = (
    named(
        _PHI_3,
        ("microsoft/Phi-3-mini-4k-instruct", 32, 3072, 32, None, 8192, {"sliding_window_size": 2048}),
        ("microsoft/Phi-3-mini-128k-instruct", 32, 3072, 32, None, 8192, _128K),
        ("microsoft/Phi-3.5-mini-instruct", 32, 3072, 32, None, 8192),
    )
    | named(
        _PHI_4,
        ("microsoft/phi-4", 40, 5120, 40, 10, 17920, {"block_size": 16384, "rope_base": 250000}),
        ("microsoft/Phi-4-reasoning{,-plus}", 40, 5120, 40, 10, 17920, _REASONING),
    )
    | named(_PHI_4_MINI, ("microsoft/Phi-4-mini-{instruct,reasoning}", 32, 3072, 24, 8, 8192))
)

PHI = Family(
    "phi",
    "PhiForCausalLM",
    structure={"shared_attention_norm": True, "lm_head_bias": True},
    keys=llama.KEYS | {"norm_eps": "layer_norm_eps", "gelu_approximate": "hidden_act"},
    values={"hidden_act": {"gelu_new": "tanh"} | neox.GELU},
    defaults={"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None}
    | {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    expects={"qk_layernorm": (False,)},
    outer=llama.OUTER | {"transformer.ln_f": "model.final_layernorm"},
    blocks="model.layers",
    block={
        "norm_1": "input_layernorm",
        "attn.qkv": llama.ATTENTION["attn.qkv"],
        "attn.proj": "self_attn.dense",
        "mlp.fc": "mlp.fc1",
        "mlp.proj": "mlp.fc2",
    },
    models=named(
        _PHI,
        ("microsoft/phi-1_5", 24, 2048, 32, None, None, {"rotary_percentage": 0.5}),
        ("microsoft/phi-2", 32, 2560, 32, None, None, {"rotary_percentage": 0.4}),
    ),
)
PHI_3 = llama.like_llama(
    "phi3",
    "Phi3ForCausalLM",
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    | {"sliding_window": None, "partial_rotary_factor": 1.0},
    windows="1",
    block=llama.ATTENTION
    | {
        "attn.qkv": "self_attn.qkv_proj",
        "mlp.fc_1 mlp.fc_2": "mlp.gate_up_proj",
        "mlp.proj": "mlp.down_proj",
    },
    models=_PHI_3_MODELS,
    tied_models="Phi-4-mini-*",
)
FAMILIES = (PHI, PHI_3)
