"""OLMo and OLMo-2."""

from litgpt.families import llama
from litgpt.families.base import Family, named

# The norms of OLMo have no weights.
_OLMO_STRUCTURE = llama.STRUCTURE | {"norm_class_name": "LayerNorm", "norm_affine": False}
_OLMO = _OLMO_STRUCTURE | {
    "vocab_size": 50280,
    "padded_vocab_size": 50304,
    "block_size": 2048,
}
_OLMO_2_STRUCTURE = llama.STRUCTURE | {
    "norm_qk": True,
    "norm_qk_type": "olmo2",
    "norm_1": False,
    "norm_2": False,
    "post_attention_norm": True,
    "post_mlp_norm": True,
}
_OLMO_2 = _OLMO_2_STRUCTURE | {
    "vocab_size": 100278,
    "padded_vocab_size": 100352,
    "norm_eps": 1e-6,
    "rope_base": 500000,
}

_OLMO_MODELS = named(
    _OLMO,
    ("allenai/OLMo-1B-hf", 16, 2048, 16, None, 8192),
    ("allenai/OLMo-7B-{,Instruct-}hf", 32, 4096, 32, None, 11008),
)
_OLMO_2_MODELS = named(
    _OLMO_2,
    ("allenai/OLMo-2-1124-7B{,-SFT,-DPO,-Instruct}", 32, 4096, 32, 32, 11008),
    ("allenai/OLMo-2-1124-13B{,-SFT,-DPO,-Instruct}", 40, 5120, 40, 40, 13824),
)

OLMO = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    structure=_OLMO_STRUCTURE | {"norm_eps": 1e-5},
    keys={field: key for field, key in llama.KEYS.items() if field != "norm_eps"},
    defaults=llama.DEFAULTS,
    expects={"hidden_act": llama.SILU, "clip_qkv": (None,), "attention_bias": (False,)},
    name_mark="OLMo",
    **llama.NAMES,
    models=_OLMO_MODELS,
    tied_models="OLMo-1B-hf",
)
OLMO_2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    structure=_OLMO_2_STRUCTURE,
    keys=llama.KEYS,
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5},
    expects={"hidden_act": llama.SILU, "attention_bias": (False,)},
    outer=llama.OUTER,
    blocks="model.layers",
    block={
        "attn.qkv": llama.ATTENTION["attn.qkv"],
        "attn.norm_q": "self_attn.q_norm",
        "attn.norm_k": "self_attn.k_norm",
        "attn.proj": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }
    | llama.MLP,
    models=_OLMO_2_MODELS,
)
FAMILIES = (OLMO, OLMO_2)
