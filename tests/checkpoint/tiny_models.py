"""Tiny random models of `transformers`, one or more for each family, saved as folders."""

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 70,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 3.0, 8.0, 16.0],
}
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SOFTCAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"ffn_hidden_size": 48}
GEMMA_3 = GROUPED | {"head_dim": 16, "sliding_window": 4, "num_hidden_layers": 7, "query_pre_attn_scalar": 24}
DEEPSEEK = SIZES | {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# name -> (model_type, what differs from the defaults of its config class)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "llama head_dim": ("llama", GROUPED | {"head_dim": 16}),
    "llama biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama linear rope": (
        "llama",
        SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama 3 rope": ("llama", GROUPED | {"rope_parameters": LLAMA_3}),
    "llama yarn": ("llama", GROUPED | {"rope_parameters": YARN}),
    "llama yarn scales": (
        "llama",
        GROUPED | {"rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 4, "truncate": False}},
    ),
    "smollm3": ("smollm3", GROUPED | {"num_hidden_layers": 5, "pad_token_id": 0}),
    "smollm3 listed": (
        "smollm3",
        GROUPED | {"no_rope_layers": [0, 1, 0], "pad_token_id": 0, "tie_word_embeddings": False},
    ),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "mistral window": ("mistral", GROUPED | {"sliding_window": 5}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "gpt_neox": ("gpt_neox", SIZES | {"hidden_act": "gelu"}),
    "gpt_neox sequential": ("gpt_neox", SIZES | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt_neox tied": ("gpt_neox", SIZES | {"tie_word_embeddings": True}),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24} | SOFTCAPS),
    "gemma3_text": ("gemma3_text", GEMMA_3 | {"rope_parameters": GEMMA_3_ROPE}),
    "gemma3": ("gemma3", {"text_config": GEMMA_3, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "phi": (
        "phi",
        SIZES | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi grouped": ("phi", GROUPED),
    "phi3": ("phi3", GROUPED | {"pad_token_id": 0}),
    "phi3 window": ("phi3", SIZES | {"pad_token_id": 0, "sliding_window": 5}),
    "phi4-mini": ("phi3", GROUPED | {"pad_token_id": 0, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "phi3 long": (
        "phi3",
        GROUPED | {"pad_token_id": 0, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
    "phi3 long, short text": (
        "phi3",
        GROUPED
        | {"pad_token_id": 0, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE | {"factor": 3.0}},
    ),
    "qwen2": ("qwen2", GROUPED),
    "qwen2 yarn": ("qwen2", GROUPED | {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "qwen2 window": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2 tied": ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        GROUPED
        | {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}}),
    "deepseek_v3 plain": (
        "deepseek_v3",
        DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "granite": (
        "granite",
        GROUPED
        | {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    "granite biases": (
        "granite",
        GROUPED | {"attention_multiplier": 0.0078125, "attention_bias": True, "mlp_bias": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        GROUPED
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "swiglu_limit": 1.5,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "olmo": ("olmo", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "falcon 7b": ("falcon", FALCON),
    "falcon 40b": ("falcon", FALCON | NEW_FALCON),
    "falcon 11b": ("falcon", FALCON | NEW_FALCON | {"num_ln_in_parallel_attn": 1}),
    "falcon sequential": ("falcon", FALCON | {"parallel_attn": False, "bias": True, "multi_query": False}),
    "stablelm": ("stablelm", GROUPED),
    "stablelm parallel": ("stablelm", GROUPED | {"use_parallel_residual": True, "use_qkv_bias": True}),
}


def save_tiny(case: str, folder: Path, dtype: torch.dtype = torch.float32, **save_options: Any) -> Any:
    """Makes the random model of a case, saves it to `folder` and returns it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3ForConditionalGeneration

    model_type, values = CASES[case]
    config = CONFIG_MAPPING[model_type](**values)
    make = Gemma3ForConditionalGeneration._from_config if model_type == "gemma3" else AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():  # norms and biases too, and large, so that nothing is left out unnoticed
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.3
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.3)
    model = model.to(dtype)
    model.save_pretrained(folder, **save_options)
    return model
