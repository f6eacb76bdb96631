"""DeepSeek-V3 and R1: latent attention, and experts chosen group by group. (The distilled R1 models are Llama and Qwen2.)"""

from typing import Any

from litgpt.families import llama
from litgpt.families.base import named
from litgpt.settings import Settings

# `Config` field -> key in `config.json`, value of V3
_ROUTING: dict[str, tuple[Any, Any]] = {
    "n_expert": (("n_routed_experts", "num_local_experts"), 256),
    "n_expert_per_token": ("num_experts_per_tok", 8),
    "n_shared_expert": ("n_shared_experts", 1),
    "n_expert_groups": ("n_group", 8),
    "n_topk_groups": ("topk_group", 4),
    "routed_scaling_factor": ("routed_scaling_factor", 2.5),
    "norm_topk_prob": ("norm_topk_prob", True),
    "first_k_dense_replace": ("first_k_dense_replace", 3),
    "moe_intermediate_size": ("moe_intermediate_size", 2048),
    "rope_interleave": ("rope_interleave", True),
}
_LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_YARN = {"original_max_seq_len": 4096, "factor": 40, "beta_fast": 32, "beta_slow": 1}
_YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
_V3 = {field: value for field, (_, value) in _ROUTING.items()} | {
    "block_size": 163840,
    "vocab_size": 129280,
    "padded_vocab_size": 129280,
    "norm_eps": 1e-6,
    "rope_adjustments": _YARN,
    "latent_attention": _LATENT,
}


def _read(hf: Settings) -> dict[str, Any]:
    hf.whole("num_key_value_heads", None, null=True)  # only checked, since its heads have no groups
    sizes = {key: hf.whole(key, default, null=key == "q_lora_rank") for key, default in _LATENT.items()}
    return {"latent_attention": sizes}


def _write(config: Any) -> dict[str, Any]:
    return dict(config.latent_attention or {}) | {"num_key_value_heads": config.n_head}


DEEPSEEK_V3 = llama.like_llama(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    structure={"mlp_class_name": "LLaMAMoE", "n_topk_scores_per_group": 2},
    keys={"n_query_groups": None, "head_size": None} | {field: keys for field, (keys, _) in _ROUTING.items()},
    defaults={"max_position_embeddings": 4096}
    | {keys if isinstance(keys, str) else keys[0]: value for keys, value in _ROUTING.values()},
    expects={
        "attention_bias": (False,),
        "moe_layer_freq": (1,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    block={
        "norm_1": "input_layernorm",
        "attn.q_proj": "self_attn.q_proj",
        "attn.q_a_proj": "self_attn.q_a_proj",
        "attn.q_a_norm": "self_attn.q_a_layernorm",
        "attn.q_b_proj": "self_attn.q_b_proj",
        "attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn.kv_a_norm": "self_attn.kv_a_layernorm",
        "attn.kv_b_proj": "self_attn.kv_b_proj",
        "attn.proj": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm",
    }
    | llama.MLP
    | llama.EXPERTS
    | {
        "mlp.shared_experts.fc_1": "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.fc_2": "mlp.shared_experts.up_proj",
        "mlp.shared_experts.proj": "mlp.shared_experts.down_proj",
    },
    extra_blocks=True,
    read=_read,
    write=_write,
    models=named(
        _V3,
        ("deepseek-ai/DeepSeek-V3{,-Base,-0324,.1,.1-Base}", 61, 7168, 128, None, 18432),
        ("deepseek-ai/DeepSeek-R1{,-Zero,-0528}", 61, 7168, 128, None, 18432),
    ),
)
FAMILIES = (DEEPSEEK_V3,)
