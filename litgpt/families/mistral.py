"""Mistral and its mixture of experts, Mixtral."""

from litgpt.families import llama
from litgpt.families.base import named

_V1 = {"padded_vocab_size": 32000, "sliding_window_size": 4096}
_V2 = {"padded_vocab_size": 32000, "block_size": 32768, "rope_base": 1000000}
_V3 = _V2 | {"padded_vocab_size": 32768}
_MIXTRAL = _V2 | {"n_expert": 8, "n_expert_per_token": 2}
_8X22B = {"padded_vocab_size": 32768, "block_size": 65536}

_MISTRAL_MODELS = (
    named(_V1, ("mistralai/Mistral-7B-{,Instruct-}v0.1", 32, 4096, 32, 8, 14336))
    | named(_V2, ("{unsloth/Mistral-7B,mistralai/Mistral-7B-Instruct}-v0.2", 32, 4096, 32, 8, 14336))
    | named(
        _V3,
        ("mistralai/Mistral-7B-{,Instruct-}v0.3", 32, 4096, 32, 8, 14336),
        ("mistralai/mathstral-7B-v0.1=Mathstral-7B-v0.1", 32, 4096, 32, 8, 14336, {"sliding_window_size": 4096}),
        ("mistralai/Mistral-Large-Instruct-{2407,2411}", 88, 12288, 96, 8, 28672),
    )
)

MISTRAL = llama.like_llama(
    "mistral",
    "MistralForCausalLM",
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    windows="1",
    models=_MISTRAL_MODELS,
)
MIXTRAL = llama.like_llama(
    "mixtral",
    "MixtralForCausalLM",
    structure={"mlp_class_name": "LLaMAMoE"},
    keys={"n_expert": "num_local_experts", "n_expert_per_token": "num_experts_per_tok"},
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    windows="1",
    block=llama.ATTENTION
    | {
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.{}.fc_1": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.{}.fc_2": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.{}.proj": "block_sparse_moe.experts.{}.w2",
    },
    models=named(
        _MIXTRAL,
        ("mistralai/Mixtral-8x7B-{,Instruct-}v0.1", 32, 4096, 32, 8, 14336),
        ("mistralai/Mixtral-8x22B-{,Instruct-}v0.1", 56, 6144, 48, 8, 16384, _8X22B),
    ),
)
FAMILIES = (MISTRAL, MIXTRAL)
