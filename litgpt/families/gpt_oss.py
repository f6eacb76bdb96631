"""GPT-OSS: attention sinks, alternating sliding windows, biased experts with clamped inputs."""

from litgpt.families import llama
from litgpt.families.base import named

_YARN = {"original_max_seq_len": 4096, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_GPT_OSS = {
    "block_size": 131072,
    "vocab_size": 201088,
    "padded_vocab_size": 201088,
    "head_size": 64,
    "n_expert_per_token": 4,
    "swiglu_limit": 7.0,
    "rope_base": 150000,
    "rope_adjustments": _YARN,
    "sliding_window_size": 128,
    "sliding_window_indices": "10",
}

GPT_OSS = llama.like_llama(
    "gpt_oss",
    "GptOssForCausalLM",
    structure={"bias": True, "mlp_class_name": "LLaMAMoE", "attention_sinks": True, "router_bias": True},
    keys={
        "n_expert": ("num_local_experts", "num_experts"),
        "n_expert_per_token": ("num_experts_per_tok", "experts_per_token"),
        "swiglu_limit": "swiglu_limit",
    },
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5}
    | {"num_experts_per_tok": 4, "swiglu_limit": 7.0, "rope_theta": 150000, "sliding_window": 128},
    expects={"attention_bias": (True,), "swiglu_alpha": (1.702,)},
    windows="10",
    block=llama.ATTENTION | {"attn": "self_attn", "mlp.gate": "mlp.router"},
    stacked={
        "mlp.experts.{}.fc_1 mlp.experts.{}.fc_2": "mlp.experts.gate_up_proj",
        "mlp.experts.{}.proj": "mlp.experts.down_proj",
    },
    models=named(
        _GPT_OSS,
        ("openai/gpt-oss-20b", 24, 2880, 64, 8, 2880, {"n_expert": 32}),
        ("openai/gpt-oss-120b", 36, 2880, 64, 8, 2880, {"n_expert": 128}),
    ),
)
FAMILIES = (GPT_OSS,)
