"""OLMo and OLMo-2."""

from litgpt.families import llama
from litgpt.families.base import named

_OLMO = llama.STRUCTURE | {
    "norm_class_name": "LayerNorm",
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

MODELS = named(
    _OLMO,
    ("allenai/OLMo-1B-hf", 16, 2048, 16, None, 8192),
    ("allenai/OLMo-7B-{,Instruct-}hf", 32, 4096, 32, None, 11008),
) | named(
    _OLMO_2,
    ("allenai/OLMo-2-1124-7B{,-SFT,-DPO,-Instruct}", 32, 4096, 32, 32, 11008),
    ("allenai/OLMo-2-1124-13B{,-SFT,-DPO,-Instruct}", 40, 5120, 40, 40, 13824),
)
