"""The `Config` that the metadata of a GGUF file describe.

Metadata keys are those of llama.cpp (`gguf-py/gguf/constants.py`), and mean what they mean there. They are put into the
words of a `config.json`, so that the family's own table derives the `Config`. What is not understood is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from litgpt.checkpoint.gguf_file import GGUFFile
from litgpt.config import Config


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        model_type: The family's name in a `config.json`.
        interleaved_rope: Rows of q and k are ordered for rotating neighbours, as llama.cpp does for this one.
        norm_offset: What the stored norm weights have more than ours.
        more: Further entries of a `config.json`, from those that are there.
    """

    model_type: str
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    more: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda hf: {})


def _llama(hf: dict[str, Any]) -> dict[str, Any]:
    """Mistral and Mixtral come under the name llama."""
    if hf.get("num_local_experts"):
        return {"model_type": "mixtral"}
    return {"model_type": "mistral"} if hf.get("sliding_window") else {}


def _query_scale(layers_of_27b: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """GGUF may leave out the scale of attention: head size, but width per head in the 27B models."""

    def more(hf: dict[str, Any]) -> dict[str, Any]:
        width_per_head = hf["hidden_size"] // hf["num_attention_heads"]
        large = hf["num_hidden_layers"] == layers_of_27b
        return {"query_pre_attn_scalar": width_per_head if large else hf.get("head_dim", 256)} | (
            {"query_pre_attn_scalar": hf["query_pre_attn_scalar"]} if "query_pre_attn_scalar" in hf else {}
        )

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
_WHOLE = {*_SIZES, "attention.sliding_window", "expert_count", "expert_used_count", "expert_feed_forward_length"}
# Read elsewhere in this file, or without meaning for the result
_READ = {
    "attention.scale",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "tensor_data_layout",
    "vocab_size",
}
# What the architectures above have no part for: the values with which there is nothing to compute
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "embedding_scale": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
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

    Raises `ValueError` in one line that names the key, for what is missing, of the wrong type or out of range, does not fit
    the tensors, or would change the result and is not known.
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
        config = Config.from_hf(hf, name=name)
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
        """A finite number that is not negative; one for each layer counts if all are equal.

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
        """What only the tensors tell; that their number of layers is the metadata's comes before anything is built."""
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
        """Settings that change nothing although the family passes over them."""
        if key == "attention.sliding_window":
            return value >= hf["max_position_embeddings"]
        return key == "expert_feed_forward_length" and value == hf["intermediate_size"]

    def pattern(self) -> dict[str, Any]:
        """Which layers have a sliding window: one in so many has none, or a flag for each layer."""
        value = self.settings.get("attention.sliding_window_pattern")
        if value is None or value == 0:
            return {}
        if isinstance(value, list):
            return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in value]}
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong("attention.sliding_window_pattern", "must be a whole number, or flags for the layers")
        return {"sliding_window_pattern": value}

    def scale(self, hf: dict[str, Any]) -> dict[str, Any]:
        """The scale of attention, where the file has one."""
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
        """Puts `rope_scaling` into `hf`; returns a factor on cosines and sines that is to be set besides, or 1.

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
        # how far YaRN keeps high frequencies; negative is unset
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
    """What each of `count` rotary frequencies is divided by."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi)
    turns = turns * theta ** -(torch.arange(count, dtype=torch.double) / count)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a frequency that stays as it is
    return 1 / ((1 - kept) / scaling["factor"] + kept)
