"""GGUF files as checkpoints: their tensors, which have llama.cpp's names, under ours."""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from litgpt.checkpoint.base import HEAD, Checkpoint, RowShard
from litgpt.checkpoint.gguf_config import ARCHITECTURES, ROPE_TENSORS, config_from_gguf
from litgpt.checkpoint.gguf_file import GGUFFile
from litgpt.checkpoint.weights import qkv_sizes
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer

_OUTER = {"token_embd": "transformer.wte", "output_norm": "transformer.ln_f", "output": "lm_head"}
_EMBEDDINGS = ("token_embd.weight", "output.weight")
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


class GGUFCheckpoint(Checkpoint):
    """A `.gguf` file of one of the architectures of `gguf_config.py`, or one shard of a split one.

    `dtype` is the data type of most weights, `torch.bfloat16` if they are quantised; `tensors` and `row_shards` dequantise
    to float32. Raises `FileNotFoundError`, or `ValueError` in one line for a file that cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._file = GGUFFile(self.path)
        self.files = self._file.paths
        name = self._file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{self.path}: GGUF architecture {name!r} is not supported; supported: {known}")
        self._architecture = ARCHITECTURES[name]
        self.tied = "output.weight" not in self._file.tensors

    @cached_property
    def config(self) -> Config:
        try:
            return config_from_gguf(self._file, _QUANTISATION.sub("", self._file.stem))
        except ValueError as error:
            problem = " ".join(str(error).removeprefix("config.json: ").split())  # keys may hold anything
            raise ValueError(f"{self.path}: {problem}") from None

    @cached_property
    def dtype(self) -> torch.dtype:
        return self._file.dtype

    def row_shards(self, meta: bool = False) -> Iterator[RowShard]:
        for name in self._file.tensors:
            if name in ROPE_TENSORS:  # these are part of the config
                continue
            # embeddings are the largest
            pieces = self._file.pieces(name, meta) if name in _EMBEDDINGS else [(0, self._file.read(name, meta))]
            for row, value in pieces:
                yield from self._place(name, row, value)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def eos_ids(self) -> list[int]:
        return list(self._tokenizer.eos_ids)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from litgpt.checkpoint.gguf_tokenizer import tokenizer_from_gguf

        rows = self._file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in self._file.tensors else None
        try:
            return tokenizer_from_gguf(self._file.metadata, rows)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _place(self, name: str, row: int, value: torch.Tensor) -> Iterator[RowShard]:
        """The row shards that the tensor `name` holds, whose rows from `row` on are `value`."""
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
            yield f"{prefix}{target}.{kind}", row, value
            if self.tied and module == "token_embd":
                yield HEAD, row, value
        else:
            raise ValueError(f"{self.path}: the GGUF tensor {name!r} is not known for this architecture")


def _halves(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows of each head reordered from neighbouring pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...)."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)
