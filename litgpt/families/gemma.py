"""Gemma, Gemma 2 and Gemma 3 (text)."""

from litgpt.families import llama
from litgpt.families.base import named

_STRUCTURE = {"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True}
_STRUCTURE |= {"norm_unit_offset": True}
_POST_NORMS = _STRUCTURE | {"post_attention_norm": True, "post_mlp_norm": True}
_256 = {"head_size": 256}
_GEMMA_2 = {
    "vocab_size": 256000,
    "block_size": 8192,
    "head_size": 256,
    "attention_scores_scalar": 256,
    "sliding_window_size": 4096,
    "sliding_window_indices": "10",
    "attention_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_2_27B = {"head_size": 128, "attention_scores_scalar": 144}
_GEMMA_3 = {
    "vocab_size": 262144,
    "block_size": 131072,
    "head_size": 256,
    "attention_scores_scalar": 256,
    "sliding_window_size": 1024,
    "sliding_window_indices": "111110",
    "rope_base": 1000000,
    "rope_local_base_freq": 10000,
    "rope_indices": "111110",
    "rope_adjustments": {"factor": 8.0},
}
_GEMMA_3_1B = {"sliding_window_size": 512, "rope_adjustments": None}
_GEMMA_3_270M = _GEMMA_3_1B | {"block_size": 32768, "norm_eps": 1e-6}
_GEMMA_3_27B = {"head_size": 128, "attention_scores_scalar": 168}

_EXPECTS = {"attention_bias": (False,), "use_bidirectional_attention": (None, False)}
_EXPECTS_POST_NORMS = _EXPECTS | {"hidden_act": None, "hidden_activation": ("gelu_pytorch_tanh",)}
_KEYS = {
    "attention_scores_scalar": "query_pre_attn_scalar",
    "attention_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_BLOCK = (
    llama.ATTENTION
    | llama.MLP
    | {
        "post_attention_norm": "post_attention_layernorm",
        "norm_2": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }
)

GEMMA = llama.like_llama(
    "gemma",
    "GemmaForCausalLM",
    structure=_STRUCTURE,
    defaults={"max_position_embeddings": 8192, "head_dim": 256},
    # "gelu" is how the first files spelled the tanh approximation
    expects=_EXPECTS | {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh", None)},
    name_mark="Gemma",
    tied=True,
    models=named(
        {"vocab_size": 256000, "padding_multiple": 64},
        ("google/gemma-2b{,-it}=Gemma-2b{,-it}", 18, 2048, 8, 1, 16384),
        ("google/gemma-7b{,-it}=Gemma-7b{,-it}", 28, 3072, 16, None, 24576, _256),
        ("google/codegemma-7b-it=CodeGemma-7b-it", 28, 3072, 16, None, 24576, _256),
    ),
)
GEMMA_2 = llama.like_llama(
    "gemma2",
    "Gemma2ForCausalLM",
    structure=_POST_NORMS,
    keys=_KEYS,
    defaults={"max_position_embeddings": 8192, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    expects=_EXPECTS_POST_NORMS,
    name_mark="Gemma",
    tied=True,
    windows="10",
    block=_BLOCK,
    models=named(
        _GEMMA_2,
        ("google/gemma-2-2b{,-it}=Gemma-2-2b{,-it}", 26, 2304, 8, 4, 9216),
        ("google/gemma-2-9b{,-it}=Gemma-2-9b{,-it}", 42, 3584, 16, 8, 14336),
        ("google/gemma-2-27b{,-it}=Gemma-2-27b{,-it}", 46, 4608, 32, 16, 36864, _GEMMA_2_27B),
    ),
)
GEMMA_3 = llama.like_llama(
    "gemma3_text",
    "Gemma3ForCausalLM",
    structure=_POST_NORMS | {"norm_qk": True},
    keys=_KEYS,
    # the text part of a multimodal file leaves out what it does not change
    defaults={
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 4096,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
    },
    expects=_EXPECTS_POST_NORMS,
    name_mark="Gemma",
    tied=True,
    windows="111110",
    block=_BLOCK | llama.QK_NORM,
    prefixes={
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "language_model.lm_head.": "lm_head.",
    },
    ignored=("rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector."),
    models=named(
        _GEMMA_3,
        ("google/gemma-3-270m{,-it}=Gemma-3-270m{,-it}", 18, 640, 4, 1, 2048, _GEMMA_3_270M),
        ("google/gemma-3-1b-it=Gemma-3-1b-it", 26, 1152, 4, 1, 6912, _GEMMA_3_1B),
        ("google/gemma-3-4b-it=Gemma-3-4b-it", 34, 2560, 8, 4, 10240),
        ("google/gemma-3-12b-it=Gemma-3-12b-it", 48, 3840, 16, 8, 15360),
        ("google/gemma-3-27b-it=Gemma-3-27b-it", 62, 5376, 32, 16, 21504, _GEMMA_3_27B),
    ),
)
FAMILIES = (GEMMA, GEMMA_2, GEMMA_3)
