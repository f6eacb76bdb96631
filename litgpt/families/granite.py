"""Granite 3: Llama with fixed factors on embedding, attention, residual stream and logits."""

from typing import Any

from litgpt.families import llama
from litgpt.families.base import named
from litgpt.settings import Settings

_GRANITE_33 = {"block_size": 131072, "vocab_size": 49159, "padded_vocab_size": 49159, "rope_base": 10000000}
_GRANITE_33 |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
_2B = {"attention_scores_scalar": 4096, "logits_divisor": 8.0}
_8B = {"attention_scores_scalar": 16384, "logits_divisor": 16.0}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier")


def _read(hf: Settings) -> dict[str, Any]:
    scalar = hf.number("attention_multiplier", 1.0, least=1e-9) ** -2
    return llama.read(hf) | {"attention_scores_scalar": float(f"{scalar:.12g}")}


def _write(config: Any) -> dict[str, Any]:
    return llama.write(config) | {"attention_multiplier": (config.attention_scores_scalar or config.head_size) ** -0.5}


GRANITE = llama.like_llama(
    "granite",
    "GraniteForCausalLM",
    keys={name: name for name in _MULTIPLIERS} | {"logits_divisor": "logits_scaling"},
    defaults=dict.fromkeys((*_MULTIPLIERS, "logits_scaling"), 1.0),
    read=_read,
    write=_write,
    tied=True,
    models=named(
        _GRANITE_33,
        ("ibm-granite/granite-3.3-2b-instruct", 40, 2048, 32, 8, 8192, _2B),
        ("ibm-granite/granite-3.3-8b-instruct", 40, 4096, 32, 8, 12800, _8B),
    ),
)
FAMILIES = (GRANITE,)
