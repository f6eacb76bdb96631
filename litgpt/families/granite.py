"""Granite 3: Llama with fixed factors on embedding, attention, residual stream and logits."""

from typing import Any

from litgpt.families import llama
from litgpt.families.base import Family


def _read(hf: dict[str, Any]) -> dict[str, Any]:
    scalar = hf.get("attention_multiplier", 1.0) ** -2
    return llama.read(hf) | {"attention_scores_scalar": float(f"{scalar:.12g}")}


def _write(config: Any) -> dict[str, Any]:
    return llama.write(config) | {"attention_multiplier": (config.attention_scores_scalar or config.head_size) ** -0.5}


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    structure=llama.STRUCTURE,
    keys={field: key for field, key in llama.KEYS.items() if field != "head_size"}
    | {
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_divisor": "logits_scaling",
    },
    defaults=llama.DEFAULTS | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
    expects={"hidden_act": llama.SILU},
    **llama.NAMES,
    read=_read,
    write=_write,
)
FAMILIES = (GRANITE,)
