"""GGUF files as checkpoints: their metadata as a `Config`, their tensors under our names.

Metadata keys and tensor names are those of llama.cpp (`gguf-py/gguf/constants.py`). The metadata are put into the words
of a `config.json`, so that the family's own table derives the `Config`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.base import HEAD, Checkpoint, Piece
from litgpt.checkpoint.gguf_file import GGUFFile
from litgpt.checkpoint.weights import qkv_sizes
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer

_KEYS = {  # metadata, after "<architecture>." -> `config.json`
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_OUTER = {"token_embd": "transformer.wte", "output_norm": "transformer.ln_f", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "norm_1",
    "attn_qkv": "attn.qkv",
    "attn_output": "attn.proj",
    "attn_q_norm": "attn.norm_q",
    "attn_k_norm": "attn.norm_k",
    "post_attention_norm": "post_attention_norm",
    "ffn_norm": "norm_2",
    "ffn_gate": "mlp.fc_1",
    "ffn_up": "mlp.fc_2",
    "ffn_down": "mlp.proj",
    "post_ffw_norm": "post_mlp_norm",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "fc_1", "ffn_up_exps": "fc_2", "ffn_down_exps": "proj"}
_QKV = ("attn_q", "attn_k", "attn_v")
_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")
_QUANTISATION = re.compile(r"[.-](I?Q\d\w*|BF16|F?P?16|F32)$", re.IGNORECASE)
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Architecture:
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
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: {}


def _mixtral(hf: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "mixtral"} if hf.get("num_local_experts") else {}


def _query_scale(layers_of_27b: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """GGUF leaves out the scale of attention: head size, but width per head in the 27B models."""

    def more(hf: dict[str, Any]) -> dict[str, Any]:
        width_per_head = hf["hidden_size"] // hf["num_attention_heads"]
        large = hf["num_hidden_layers"] == layers_of_27b
        return {"query_pre_attn_scalar": width_per_head if large else hf.get("head_dim", 256)}

    return more


_ARCHITECTURES = {
    "llama": _Architecture("llama", interleaved_rope=True, more=_mixtral),
    "gemma": _Architecture("gemma", norm_offset=1.0),
    "gemma2": _Architecture("gemma2", norm_offset=1.0, more=_query_scale(layers_of_27b=46)),
    "gemma3": _Architecture("gemma3_text", norm_offset=1.0, more=_query_scale(layers_of_27b=62)),
    "olmo2": _Architecture("olmo2"),
    "phi3": _Architecture("phi3"),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "smollm3": _Architecture("smollm3", interleaved_rope=True),
    "qwen3moe": _Architecture("qwen3_moe", more=lambda hf: {"norm_topk_prob": True}),
}


class GGUFCheckpoint(Checkpoint):
    """A `.gguf` file of one of the architectures above.

    `dtype` is that of most weights, `torch.bfloat16` when they are quantised; `tensors` and `pieces` give quantised
    weights in float32. Raises `FileNotFoundError`, or `ValueError` in one line, for what is no usable GGUF file.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._file = GGUFFile(self.path)
        self.files = [self.path]
        name = self._file.metadata.get("general.architecture")
        if name not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"{self.path}: GGUF architecture {name!r} is not supported; supported: {known}")
        self._architecture = _ARCHITECTURES[name]
        self.tied = "output.weight" not in self._file.tensors

    @cached_property
    def config(self) -> Config:
        metadata, tensors = self._file.metadata, self._file.tensors
        prefix = f"{metadata['general.architecture']}."
        settings = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        try:
            hf = {theirs: _number(settings[ours]) for ours, theirs in _KEYS.items() if ours in settings}
            hf["model_type"] = self._architecture.model_type
            hf["vocab_size"] = tensors["token_embd.weight"].shape[0]
            hf["attention_bias"] = "blk.0.attn_q.bias" in tensors
            hf["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
            hf.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
            hf["partial_rotary_factor"] = settings.get("rope.dimension_count", hf["head_dim"]) / hf["head_dim"]
            hf["rope_scaling"] = self._rope_scaling(settings, hf)
            hf |= self._architecture.more(hf)
            return Config.from_hf(hf, name=_QUANTISATION.sub("", self.path.stem))
        except KeyError as error:
            raise ValueError(f"{self.path}: the GGUF file lacks what gives {error}") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    @cached_property
    def dtype(self) -> torch.dtype:
        return self._file.dtype

    def pieces(self, meta: bool = False) -> Iterator[Piece]:
        for name in self._file.tensors:
            if not name.startswith("rope_"):  # is part of the config
                yield from self._place(name, self._file.read(name, meta))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: dict[str, dict[int, torch.Tensor]] = {}
        for name, row, piece in self.pieces():
            if ".attn.qkv." not in name:
                yield name, piece
                continue
            parts = waiting.setdefault(name, {})
            parts[row] = piece
            if sum(map(len, parts.values())) == sum(qkv_sizes(self.config)):
                yield name, torch.cat([part for _, part in sorted(parts.items())])
                del waiting[name]

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def eos_ids(self) -> list[int]:
        return list(self._tokenizer.eos_ids)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from litgpt.checkpoint.gguf_tokenizer import tokenizer_from_gguf

        try:
            return tokenizer_from_gguf(self._file.metadata)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _place(self, name: str, value: torch.Tensor) -> Iterator[Piece]:
        """The parameters, or parts of them, that the tensor `name` holds."""
        match = _NAME.fullmatch(name)
        block, module, kind = match.groups() if match else (None, name, "")
        if module.endswith("_norm") and self._architecture.norm_offset:
            value = value - self._architecture.norm_offset
        prefix = "" if block is None else f"transformer.h.{block}."
        if prefix and module in _QKV:
            part, sizes = _QKV.index(module), qkv_sizes(self.config)
            if self._architecture.interleaved_rope and module != "attn_v" and len(value) == sizes[part]:
                value = _halves(value, self.config.head_size)
            yield f"{prefix}attn.qkv.{kind}", sum(sizes[:part]), value
        elif prefix and module in _EXPERTS:
            for i, expert in enumerate(value):
                yield f"{prefix}mlp.experts.{i}.{_EXPERTS[module]}.{kind}", 0, expert
        elif module == "ffn_up" and f"blk.{block}.ffn_gate.weight" not in self._file.tensors:
            for ours, half in zip(("fc_1", "fc_2"), value.chunk(2), strict=True):
                yield f"{prefix}mlp.{ours}.{kind}", 0, half
        elif target := (_BLOCK if prefix else _OUTER).get(module):
            yield f"{prefix}{target}.{kind}", 0, value
            if self.tied and module == "token_embd":
                yield HEAD, 0, value
        else:
            raise ValueError(f"{self.path}: the GGUF tensor {name!r} is not known for this architecture")

    def _rope_scaling(self, settings: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any] | None:
        """`rope_scaling` of a `config.json`; Llama 3's is stored as one divisor for each frequency."""
        original = settings.get("rope.scaling.original_context_length")
        if _ROPE_FREQS in self._file.tensors:
            divisors = self._file.read(_ROPE_FREQS).double()
            scaling = {
                "rope_type": "llama3",
                "factor": round(divisors.max().item(), 4),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original or 8192,
            }
            expected = _llama_3_divisors(len(divisors), hf.get("rope_theta", 10000.0), scaling)
            if not torch.allclose(divisors, expected, rtol=1e-3):
                raise ValueError(f"{_ROPE_FREQS} does not follow Llama 3's rule, which is the only one supported")
            return scaling
        if "rope_factors_long.weight" in self._file.tensors:
            hf["original_max_position_embeddings"] = original or hf.get("max_position_embeddings")
            factors = {kind: self._file.read(f"rope_factors_{kind}.weight").tolist() for kind in ("short", "long")}
            return {"rope_type": "longrope"} | {
                f"{kind}_factor": [_number(value) for value in values] for kind, values in factors.items()
            }
        kind = settings.get("rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": settings.get("rope.scaling.factor")}
        return scaling | {"original_max_position_embeddings": original or hf.get("max_position_embeddings")}


def _halves(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows of each head reordered from neighbouring pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...)."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _llama_3_divisors(count: int, theta: float, scaling: dict[str, Any]) -> torch.Tensor:
    """What each of `count` rotary frequencies is divided by."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi)
    turns = turns * theta ** -(torch.arange(count, dtype=torch.double) / count)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a frequency that stays as it is
    return 1 / ((1 - kept) / scaling["factor"] + kept)


def _number(value: Any) -> Any:
    """A setting as a plain number; what is given for each layer must agree.

    Floats are float32 in the file: 9.999999747378752e-06 was 1e-05.
    """
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ValueError(f"a setting differs between layers, which is not supported: {sorted(set(value))}")
        value = value[0]
    return float(f"{value:.7g}") if isinstance(value, float) else value
