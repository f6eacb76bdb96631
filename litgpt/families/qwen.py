"""Qwen2, Qwen2.5, QwQ, Qwen3 and its mixture of experts."""

from litgpt.families import llama
from litgpt.families.base import named

_QWEN_25 = {"vocab_size": 151643, "padded_vocab_size": 152064, "block_size": 32768, "rope_base": 1000000}
_QWEN_25_SMALL = _QWEN_25 | {"padded_vocab_size": 151936, "norm_eps": 1e-6}
_MATH = {"block_size": 4096, "rope_base": 10000}
_1M = {"block_size": 1010000, "rope_base": 10000000}
_LONG = {"block_size": 131072}
_QWEN_3 = _QWEN_25_SMALL | {"block_size": 40960}
_128 = {"head_size": 128}
_QWEN_3_MOE = _QWEN_3 | _128 | {"n_expert": 128, "n_expert_per_token": 8}
_2507 = {"block_size": 262144, "rope_base": 5000000}
_30B = {"moe_intermediate_size": 768}
_30B_2507 = _30B | _2507 | {"rope_base": 10000000}
_235B = {"moe_intermediate_size": 1536}

_QWEN_2_MODELS = (
    named(
        _QWEN_25_SMALL,
        ("Qwen/Qwen2-0.5B", 24, 896, 14, 2, 4864, _LONG),
        ("Qwen/Qwen2-0.5B-Instruct", 24, 896, 14, 2, 4864),
        ("Qwen/Qwen2-1.5B", 28, 1536, 12, 2, 8960, _LONG),
        ("Qwen/Qwen2-1.5B-Instruct", 28, 1536, 12, 2, 8960),
        ("Qwen/Qwen2.5-{,Coder-}0.5B Qwen/Qwen2.5-{,Coder-}0.5B-Instruct", 24, 896, 14, 2, 4864),
        ("Qwen/Qwen2.5-1.5B{,-Instruct}", 28, 1536, 12, 2, 8960, _LONG),
        ("Qwen/Qwen2.5-Coder-1.5B{,-Instruct}", 28, 1536, 12, 2, 8960),
        ("Qwen/Qwen2.5-Math-1.5B{,-Instruct}", 28, 1536, 12, 2, 8960, _MATH),
        ("Qwen/Qwen2.5-{,Coder-}3B Qwen/Qwen2.5-{,Coder-}3B-Instruct", 36, 2048, 16, 2, 11008),
    )
    | named(
        _QWEN_25 | {"norm_eps": 1e-6},
        ("Qwen/Qwen2-7B", 28, 3584, 28, 4, 18944, _LONG),
        ("Qwen/Qwen2-7B-Instruct", 28, 3584, 28, 4, 18944),
        ("Qwen/Qwen2.5-7B{,-Instruct}", 28, 3584, 28, 4, 18944, _LONG),
        ("Qwen/Qwen2.5-Coder-7B{,-Instruct}", 28, 3584, 28, 4, 18944),
        ("Qwen/Qwen2.5-Math-7B{,-Instruct}", 28, 3584, 28, 4, 18944, _MATH),
    )
    | named(
        _QWEN_25,
        ("Qwen/Qwen2.5-14B{,-Instruct}", 48, 5120, 40, 8, 13824, _LONG),
        ("Qwen/Qwen2.5-Coder-14B{,-Instruct}", 48, 5120, 40, 8, 13824),
        ("Qwen/Qwen2.5-32B{,-Instruct} Qwen/QwQ-32B", 64, 5120, 40, 8, 27648, _LONG),
        ("Qwen/Qwen2.5-Coder-32B{,-Instruct} Qwen/QwQ-32B-Preview", 64, 5120, 40, 8, 27648),
        ("Qwen/Qwen2.5-72B{,-Instruct}", 80, 8192, 64, 8, 29568, _LONG),
        ("Qwen/Qwen2.5-Math-72B{,-Instruct}", 80, 8192, 64, 8, 29568, _MATH),
        ("Qwen/Qwen2.5-7B-Instruct-1M", 28, 3584, 28, 4, 18944, _1M),
        ("Qwen/Qwen2.5-14B-Instruct-1M", 48, 5120, 40, 8, 13824, _1M),
    )
)
_QWEN_3_MODELS = named(
    _QWEN_3,
    ("Qwen/Qwen3-0.6B{,-Base}", 28, 1024, 16, 8, 3072, _128),
    ("Qwen/Qwen3-1.7B{,-Base}", 28, 2048, 16, 8, 6144),
    ("Qwen/Qwen3-4B{,-Base}", 36, 2560, 32, 8, 9728, _128),
    ("Qwen/Qwen3-8B{,-Base}", 36, 4096, 32, 8, 12288),
    ("Qwen/Qwen3-14B{,-Base}", 40, 5120, 40, 8, 17408),
    ("Qwen/Qwen3-32B", 64, 5120, 64, 8, 25600, _128),
    ("Qwen/Qwen3-4B-{Thinking,Instruct}-2507", 36, 2560, 32, 8, 9728, _2507 | _128),
)
_QWEN_3_MOE_MODELS = named(
    _QWEN_3_MOE,
    ("Qwen/Qwen3-30B-A3B{,-Base}", 48, 2048, 32, 4, 6144, _30B),
    ("Qwen/Qwen3-30B-A3B-{Thinking,Instruct}-2507", 48, 2048, 32, 4, 6144, _30B_2507),
    ("Qwen/Qwen3-235B-A22B", 94, 4096, 64, 4, 12288, _235B),
    ("Qwen/Qwen3-235B-A22B-{Thinking,Instruct}-2507", 94, 4096, 64, 4, 12288, _235B | _2507),
)

_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_DEFAULTS |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

QWEN_2 = llama.like_llama(
    "qwen2",
    "Qwen2ForCausalLM",
    structure={"attn_bias": True},
    defaults=_DEFAULTS,
    windows="layers",
    models=_QWEN_2_MODELS,
    tied_models="*-0.5B* *-1.5B* *-3B*",
)
QWEN_3 = llama.like_llama(
    "qwen3",
    "Qwen3ForCausalLM",
    structure={"norm_qk": True},
    defaults=_DEFAULTS | {"head_dim": 128},
    expects={"attention_bias": (False,)},
    windows="layers",
    block=llama.ATTENTION | llama.QK_NORM | llama.MLP,
    models=_QWEN_3_MODELS,
    tied_models="Qwen3-0.6B* Qwen3-1.7B* Qwen3-4B*",
)
QWEN_3_MOE = llama.like_llama(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    structure={"norm_qk": True, "mlp_class_name": "LLaMAMoE"},
    keys={
        "moe_intermediate_size": "moe_intermediate_size",
        "n_expert": ("num_experts", "num_local_experts"),
        "n_expert_per_token": "num_experts_per_tok",
    },
    defaults=_DEFAULTS
    | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "norm_topk_prob": False}
    | {"num_experts": 128, "num_experts_per_tok": 8},
    expects={
        "attention_bias": (False,),
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    windows="1",
    block=llama.ATTENTION | llama.QK_NORM | llama.EXPERTS,
    models=_QWEN_3_MOE_MODELS,
)
FAMILIES = (QWEN_2, QWEN_3, QWEN_3_MOE)
