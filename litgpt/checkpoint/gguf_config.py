"""The `Config` that the metadata of a GGUF file describe.

Metadata keys have the meaning that they have in llama.cpp (`gguf-py/gguf/constants.py`). They are translated to the keys of
a `config.json`, from which the family's own table derives the `Config`. Unknown keys are refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from litgpt.checkpoint.gguf_file import GGUFFile
from litgpt.config import Config
from litgpt.families import renamed


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        model_type: The family's name in a `config.json`.
        interleaved_rope: Rows of q and k are ordered for rotating neighbours, as llama.cpp does for this one.
        norm_offset: Stored norm weights minus ours.
        more: Derives further entries of a `config.json` from the others.
    """

    model_type: str
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    more: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda hf: {})


def _llama(hf: dict[str, Any]) -> dict[str, Any]:
    """GGUF files of Mistral and Mixtral have the architecture llama."""
    if hf.get("num_local_experts"):
        return {"model_type": "mixtral"}
    return {"model_type": "mistral"} if hf.get("sliding_window") else {}


def _query_scale(layers_of_27b: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The default of the attention scale is the head size, but the width per head in the 27B models."""

    def more(hf: dict[str, Any]) -> dict[str, Any]:
        width_per_head = hf["hidden_size"] // hf["num_attention_heads"]
        default = width_per_head if hf["num_hidden_layers"] == layers_of_27b else hf.get("head_dim", 256)
        return {"query_pre_attn_scalar": hf.get("query_pre_attn_scalar", default)}

    return more


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved_rope=True, more=_llama),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0, more=_query_scale(layers_of_27b=46)),
    "gemma3": Architecture("gemma3_text", norm_offset=1.0, more=_query_scale(layers_of_27b=62)),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", interleaved_rope=True),
    "qwen3moe": Architecture("qwen3_moe", more=lambda hf: {"norm_topk_prob": True}),
}

# Keys after "<architecture>.": positive numbers -> `config.json`
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
# The same, but zero means none; and the `Config` field that shows whether the family computes with it
_OPTIONAL = {
    "attention.sliding_window": ("sliding_window", "sliding_window_size"),
    "attn_logit_softcapping": ("attn_logit_softcapping", "attention_logit_softcapping"),
    "final_logit_softcapping": ("final_logit_softcapping", "final_logit_softcapping"),
    "expert_count": ("num_local_experts", "n_expert"),
    "expert_used_count": ("num_experts_per_tok", "n_expert_per_token"),
    "expert_feed_forward_length": ("moe_intermediate_size", "moe_intermediate_size"),
    "rope.freq_base_swa": ("rope_local_base_freq", "rope_local_base_freq"),
}
_KEYS = {theirs: key for key, theirs in (_SIZES | _NUMBERS).items()} | {
    theirs: key for key, (theirs, _) in _OPTIONAL.items()
}
_WHOLE = {*_SIZES, "attention.sliding_window", "expert_count", "expert_used_count", "expert_feed_forward_length"}
# Read elsewhere in this file, or without meaning for the result
_READ = {"attention.scale", "attention.sliding_window_pattern", "rope.dimension_count", "rope.scale_linear"}
_READ |= {"tensor_data_layout", "vocab_size"}
_READ |= {f"rope.scaling.{key}" for key in ("type", "factor", "attn_factor", "finetuned", "original_context_length")}
_READ |= {
    f"rope.scaling.yarn_{key}" for key in ("attn_factor", "beta_fast", "beta_slow", "ext_factor", "log_multiplier")
}
# Settings that the architectures above do not have: the values with which they change nothing
_NEUTRAL_VALUES: dict[tuple[Any, ...], str] = {
    (0,): "attention.clamp_kqv attention.max_alibi_bias attention.shared_kv_layers attention.temperature_length "
    "attention.temperature_scale embedding_scale expert_shared_count expert_shared_feed_forward_length "
    "leading_dense_block_count n_deepstack_layers nextn_predict_layers pooling_type router_logit_softcapping use_parallel_residual",
    # of `expert_gating_func`, 1 is softmax
    (0, 1): "attention.output_scale expert_gating_func expert_group_count expert_group_used_count expert_weights_scale "
    "interleave_moe_layer_step logit_scale moe_every_n_layers residual_scale",
    (True,): "attention.causal expert_weights_norm",
}
_NEUTRAL = {key: values for values, keys in _NEUTRAL_VALUES.items() for key in keys.split()}
_SAME_AS = {
    "attention.value_length": "head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.value_length_swa": "head_dim",
    "embedding_length_out": "hidden_size",
}
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_FACTORS = {"short": "rope_factors_short.weight", "long": "rope_factors_long.weight"}
ROPE_TENSORS = (_ROPE_FREQS, *_ROPE_FACTORS.values())


def config_from_gguf(file: GGUFFile, name: str) -> Config:
    """The architecture of a file's model, which gets `name`.

    Raises `ValueError` in one line with the key for a value that is missing, of the wrong type, out of range or
    inconsistent with the tensors, and for an unknown key.
    """
    return _Reader(file).config(name)


class _Reader:
    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.name = file.metadata["general.architecture"]
        self.architecture = ARCHITECTURES[self.name]
        prefix = f"{self.name}."
        self.settings = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}

    def config(self, name: str) -> Config:
        hf: dict[str, Any] = {"model_type": self.architecture.model_type}
        for key, theirs in (_SIZES | _NUMBERS).items():
            if key in self.settings:
                hf[theirs] = self.number(key)
                if hf[theirs] <= 0:
                    raise self.wrong(key, "must be positive")
            elif key not in ("attention.head_count_kv", "attention.key_length", "rope.freq_base"):
                raise ValueError(f"the GGUF file lacks {self.name}.{key}")
        optional = {key: self.number(key) for key in _OPTIONAL if key in self.settings}
        hf |= {_OPTIONAL[key][0]: value for key, value in optional.items() if value}
        hf.setdefault("num_key_value_heads", hf["num_attention_heads"])
        hf.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
        if hf["num_attention_heads"] % hf["num_key_value_heads"]:
            raise self.wrong("attention.head_count_kv", f"does not divide {hf['num_attention_heads']} heads")
        hf |= self.from_tensors(hf)
        self.refuse_unknown(hf)
        hf |= self.pattern() | self.scale(hf) | self.partial(hf)
        attention_factor = self.rope_scaling(hf)
        hf |= self.architecture.more(hf)
        try:
            config = Config.from_hf(hf, name=name)
        except ValueError as error:
            raise ValueError(
                renamed(str(error), {theirs: f"{self.name}.{key}" for theirs, key in _KEYS.items()})
            ) from None
        for key, value in optional.items():
            if value and getattr(config, _OPTIONAL[key][1]) != value and not self.harmless(key, value, hf):
                raise self.wrong(key, f"is not supported for the architecture {self.name!r}")
        if attention_factor != 1:
            config.rope_adjustments = {
                "factor": float(config.rope_condense_ratio),
                **(config.rope_adjustments or {}),
                "attention_factor": attention_factor,
            }
            config.rope_condense_ratio = 1
        return config

    def wrong(self, key: str, why: str) -> ValueError:
        shown = repr(self.settings.get(key))
        return ValueError(f"{self.name}.{key} = {shown if len(shown) < 60 else shown[:57] + '...'} {why}")

    def number(self, key: str, default: float | None = None) -> Any:
        """A finite number that is not negative, or a list of equal ones, one for each layer.

        Floats are float32 in the file: 9.999999747378752e-06 was 1e-05.
        """
        value = self.settings.get(key, default)
        if isinstance(value, list):
            if not value or any(other != value[0] for other in value):
                raise self.wrong(key, "differs between layers, which is not supported")
            value = value[0]
        kinds = int if key in _WHOLE else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise self.wrong(key, f"must be a {'whole ' if key in _WHOLE else ''}number")
        if not math.isfinite(value) or value < 0:
            raise self.wrong(key, "must be finite and not negative")
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def from_tensors(self, hf: dict[str, Any]) -> dict[str, Any]:
        """The entries that depend on the tensors, whose number of layers is checked before anything is built."""
        tensors = self.file.tensors
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
        if len(blocks) != hf["num_hidden_layers"]:
            raise self.wrong("block_count", f"does not fit the file, which has tensors of {len(blocks)} layers")
        if "token_embd.weight" not in tensors:
            raise ValueError(
                "the GGUF file lacks the tensor 'token_embd.weight': it is no language model, or incomplete"
            )
        shape = tensors["token_embd.weight"].shape
        if len(shape) != 2 or shape[1] != hf["hidden_size"]:
            raise self.wrong("embedding_length", f"does not fit token_embd.weight of shape {shape}")
        return {
            "vocab_size": shape[0],
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        }

    def refuse_unknown(self, hf: dict[str, Any]) -> None:
        for key, value in self.settings.items():
            if key in _NEUTRAL:
                values = value if isinstance(value, list) else [value]
                if any(isinstance(v, str) or v not in _NEUTRAL[key] for v in values):
                    raise self.wrong(key, f"is not supported for the architecture {self.name!r}")
            elif key in _SAME_AS:
                if self.number(key) not in (0, hf[_SAME_AS[key]]):
                    raise self.wrong(key, f"is not supported, only {hf[_SAME_AS[key]]}")
            elif key == "rope.dimension_count_swa":
                if value not in (0, self.settings.get("rope.dimension_count", hf["head_dim"])):
                    raise self.wrong(key, "differs from rope.dimension_count, which is not supported")
            elif key not in _READ and key not in _SIZES and key not in _NUMBERS and key not in _OPTIONAL:
                raise self.wrong(key, "is not known, and may change what the model computes")

    def harmless(self, key: str, value: Any, hf: dict[str, Any]) -> bool:
        """Whether a setting that the family does not read changes nothing."""
        if key == "attention.sliding_window":
            return value >= hf["max_position_embeddings"]
        return key == "expert_feed_forward_length" and value == hf["intermediate_size"]

    def pattern(self) -> dict[str, Any]:
        """Which layers have a sliding window: all but every n-th one, or those with a flag."""
        value = self.settings.get("attention.sliding_window_pattern")
        if value is None or value == 0:
            return {}
        if isinstance(value, list):
            return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in value]}
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong("attention.sliding_window_pattern", "must be a whole number, or flags for the layers")
        return {"sliding_window_pattern": value}

    def scale(self, hf: dict[str, Any]) -> dict[str, Any]:
        scale = self.number("attention.scale", 0)
        if not scale or math.isclose(scale, hf["head_dim"] ** -0.5, rel_tol=1e-5):
            return {}
        if self.name in ("gemma2", "gemma3"):
            return {"query_pre_attn_scalar": float(f"{scale**-2:.5g}")}
        raise self.wrong("attention.scale", f"is not supported for the architecture {self.name!r}")

    def partial(self, hf: dict[str, Any]) -> dict[str, Any]:
        rotated = self.number("rope.dimension_count", hf["head_dim"])
        if not 0 < rotated <= hf["head_dim"] or rotated % 2:
            raise self.wrong("rope.dimension_count", f"must be even, and from 2 to {hf['head_dim']}, the head size")
        return {"partial_rotary_factor": rotated / hf["head_dim"]}

    def rope_scaling(self, hf: dict[str, Any]) -> float:
        """Puts `rope_scaling` into `hf`; returns an attention factor (of cosines and sines) that `hf` has no key for, or 1.

        Llama 3's scaling is stored as one divisor for each frequency, LongRoPE's as two.
        """
        stated = self.number("rope.scaling.original_context_length", 0)
        original = stated or hf["max_position_embeddings"]
        kind = self.settings.get("rope.scaling.type", "linear")
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise self.wrong("rope.scaling.type", "is not supported, only none, linear, yarn and longrope")
        key = "rope.scaling.factor" if "rope.scaling.factor" in self.settings else "rope.scale_linear"
        factor = (self.number(key, 0) or 1) if kind != "none" else 1
        attention = self.number("rope.scaling.attn_factor", 1)
        if any(name in self.file.tensors for name in ROPE_TENSORS):
            if kind in ("linear", "yarn") and factor != 1:
                raise self.wrong(key, "besides a tensor of factors for every frequency is not supported")
            if _ROPE_FREQS in self.file.tensors:
                hf["rope_scaling"] = self.llama_3(stated or 8192, hf)
                return attention
            if missing := [name for name in _ROPE_FACTORS.values() if name not in self.file.tensors]:
                raise ValueError(f"the GGUF file lacks the tensor {missing[0]!r}")
            factors = {kind: self.file.read(name).tolist() for kind, name in _ROPE_FACTORS.items()}
            hf["original_max_position_embeddings"] = original
            hf["rope_scaling"] = {"rope_type": "longrope"} | {
                f"{kind}_factor": [float(f"{value:.7g}") for value in values] for kind, values in factors.items()
            }
            return attention if "rope.scaling.attn_factor" in self.settings else 1
        if kind == "longrope":
            raise self.wrong("rope.scaling.type", "needs the tensors rope_factors_long and rope_factors_short")
        # how much of YaRN's extrapolation at high frequencies is used; negative is unset
        extrapolation = self.settings.get("rope.scaling.yarn_ext_factor", -1)
        if extrapolation not in (0, 1) and not (isinstance(extrapolation, (int, float)) and extrapolation < 0):
            raise self.wrong("rope.scaling.yarn_ext_factor", "is not supported, only 0 and 1")
        if extrapolation < 0:
            extrapolation = int(kind == "yarn")
        if factor == 1:
            return attention
        if not extrapolation:
            hf["rope_scaling"] = {"rope_type": "linear", "factor": factor}
            return attention
        log = 0.1 * math.log(max(factor, 1))
        attention *= self.number("rope.scaling.yarn_attn_factor", 1)
        hf["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": self.number("rope.scaling.yarn_beta_fast", 0) or 32,
            "beta_slow": self.number("rope.scaling.yarn_beta_slow", 0) or 1,
        }
        if multiplier := self.number("rope.scaling.yarn_log_multiplier", 0):
            attention /= 1 + multiplier * log
        return 1 if attention == 1 else attention * (1 + log)

    def llama_3(self, original: int, hf: dict[str, Any]) -> dict[str, Any] | None:
        divisors = self.file.read(_ROPE_FREQS).double()
        scaling = {
            "rope_type": "llama3",
            "factor": round(divisors.max().item(), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = _llama_3_divisors(len(divisors), hf.get("rope_theta", 10000.0), scaling)
        if not torch.allclose(divisors, expected, rtol=1e-3):
            raise ValueError(f"{_ROPE_FREQS} does not follow Llama 3's rule, which is the only one supported")
        return scaling if scaling["factor"] != 1 else None


def _llama_3_divisors(count: int, theta: float, scaling: dict[str, Any]) -> torch.Tensor:
    """The divisor of each of `count` rotary frequencies."""
    rotations = scaling["original_max_position_embeddings"] / (2 * math.pi)
    rotations = rotations * theta ** -(torch.arange(count, dtype=torch.double) / count)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((rotations - low) / (high - low)).clamp(0, 1)  # 1: an unscaled frequency
    return 1 / ((1 - kept) / scaling["factor"] + kept)
