"""OLMo and OLMo-2."""

from litgpt.families import llama
from litgpt.families.base import named

# the norms of OLMo have no weights
_OLMO = {"vocab_size": 50280, "padded_vocab_size": 50304, "block_size": 2048}
_OLMO_2 = {"vocab_size": 100278, "padded_vocab_size": 100352, "norm_eps": 1e-6, "rope_base": 500000}

OLMO = llama.like_llama(
    "olmo",
    "OlmoForCausalLM",
    structure={"norm_class_name": "LayerNorm", "norm_affine": False, "norm_eps": 1e-5},
    keys={"norm_eps": None},
    expects={"clip_qkv": (None,), "attention_bias": (False,)},
    name_mark="OLMo",
    tied_models="OLMo-1B-hf",
    models=named(
        _OLMO,
        ("allenai/OLMo-1B-hf", 16, 2048, 16, None, 8192),
        ("allenai/OLMo-7B-{,Instruct-}hf", 32, 4096, 32, None, 11008),
    ),
)
OLMO_2 = llama.like_llama(
    "olmo2",
    "Olmo2ForCausalLM",
    structure={"norm_qk": True, "norm_qk_type": "olmo2", "norm_1": False, "norm_2": False}
    | {"post_attention_norm": True, "post_mlp_norm": True},
    defaults={"rms_norm_eps": 1e-5},
    expects={"attention_bias": (False,)},
    block={
        "attn.qkv": llama.ATTENTION["attn.qkv"],
        "attn.proj": llama.ATTENTION["attn.proj"],
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }
    | llama.QK_NORM
    | llama.MLP,
    models=named(
        _OLMO_2,
        ("allenai/OLMo-2-1124-7B{,-SFT,-DPO,-Instruct}", 32, 4096, 32, 32, 11008),
        ("allenai/OLMo-2-1124-13B{,-SFT,-DPO,-Instruct}", 40, 5120, 40, 40, 13824),
    ),
)
FAMILIES = (OLMO, OLMO_2)
