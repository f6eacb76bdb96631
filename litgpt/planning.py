"""How much memory a model and its caches take, and what fits into a given memory, before weights are loaded."""

import re
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.find import find_local
from litgpt.checkpoint.load import quantize_meta
from litgpt.checkpoint.meta_model import meta_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config
from litgpt.families import is_tied
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.memory import largest, size_in_bytes
from litgpt.model import GPT
from litgpt.runners.quantized_weights import Scheme

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a model with caches. Sizes of weights and caches are those that are then allocated, to the byte.

    Args:
        config: the model's.
        spec: the caches.
        dtype: of weights, activations and caches.
        scheme: how weights are quantised (None: they are not).
        tied: whether input and output embedding are one matrix.
        chunk: tokens of a prefill call.
    """

    config: Config
    spec: CacheSpec
    dtype: torch.dtype
    scheme: Scheme | None = None
    tied: bool = False
    chunk: int = 512

    @cached_property
    def weights(self) -> int:
        """Bytes of all parameters and buffers."""
        model = self._first_layers()
        if self.scheme is not None:
            quantize_meta(model, self.scheme, self.dtype, self.tied)
        elif self.tied:
            model.lm_head.weight = model.transformer.wte.weight

        def size(module: nn.Module) -> int:
            quantized = sum(x.numel() * x.element_size() for x in module.buffers())
            return quantized + sum(x.numel() * self.dtype.itemsize for x in module.parameters())

        return self._of_all_layers(model, size)

    def caches(self, rows: int, length: int) -> int:
        """Bytes of the caches of all layers for `rows` sequences of `length` tokens."""
        return size_in_bytes(self.spec, self.config, rows, length, self.dtype)

    def workspace(self, rows: int) -> int:
        """About what a prefill call takes at its peak: activations of a chunk in the widest layer, and logits of its rows."""
        config = self.config
        widest = max(config.intermediate_size, (config.moe_intermediate_size or 0) * max(config.n_expert_per_token, 1))
        qkv = (config.n_head + 2 * config.n_query_groups) * config.head_size
        activations = min(self.chunk, config.block_size) * (4 * config.n_embd + max(3 * widest, 2 * qkv))
        return activations * max(self.dtype.itemsize, 2) + 2 * 4 * rows * config.padded_vocab_size

    def total(self, rows: int, length: int) -> int:
        """Bytes of everything."""
        return self.weights + self.caches(rows, length) + self.workspace(rows)

    def bytes_per_token(self, length: int) -> float:
        """Of the caches, for every further token of a sequence of `length`; 0 where full caches evict."""
        step = min(64, self.config.block_size - 1)
        end = min(max(length, step + 1), self.config.block_size)
        return (self.caches(1, end) - self.caches(1, end - step)) / step

    def longest(self, rows: int, memory: int) -> int:
        """Most tokens of each of `rows` sequences, up to the model's context (0: not even one)."""
        return largest(lambda length: self.total(rows, length) <= memory, self.config.block_size)

    def most_rows(self, length: int, memory: int) -> int:
        """Most sequences of `length` tokens at a time."""
        return largest(lambda rows: self.total(rows, length) <= memory, 1 if self.spec.by_head else 1 << 20)

    def tokens_per_second(self, rows: int, length: int, bandwidth: float) -> float:
        """Decoded tokens of all rows a second if all time goes to reading weights and full caches once a step, at
        `bandwidth` bytes a second. Of a mixture of experts only those of one token count as read."""
        read = self.weights * self._read_share + self.caches(rows, length)
        return rows * bandwidth / read

    @cached_property
    def _read_share(self) -> float:
        """Share of the weights that a token reads."""
        if not self.config.n_expert:
            return 1.0
        model = self._first_layers()
        numbers, experts = (
            self._of_all_layers(model, lambda module, part=part: _numbers(module, part)) for part in ("", ".experts.")
        )
        return 1 - experts * (1 - self.config.n_expert_per_token / self.config.n_expert) / numbers

    def _first_layers(self) -> GPT:
        """The model up to the first layer that all later ones are alike, without memory: hundreds of experts take seconds."""
        config = copy(self.config)
        config.n_layer = min(config.n_layer, 1 + (config.first_k_dense_replace or 0))
        return meta_model(config)

    def _of_all_layers(self, model: GPT, size: Callable[[nn.Module], int]) -> int:
        """A size of the whole model, from that of its first layers."""
        layers = model.transformer.h
        return size(model) + (self.config.n_layer - len(layers)) * size(layers[-1])


def _numbers(module: nn.Module, part: str) -> int:
    """Numbers in the parameters whose name has that part."""
    return sum(x.numel() for name, x in module.named_parameters() if part in name)


def plan_for(
    model: str | Path | None,
    spec: CacheSpec,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    chunk: int = 512,
) -> MemoryPlan:
    """The plan for a checkpoint, or for a model that is known by name and not on this disk.

    Raises:
        ValueError: if there is no such model, or it is quantised already.
    """
    scheme = None if quantize is None else Scheme(quantize)
    dtype = torch.bfloat16 if dtype is None else dtype
    path = find_local(model)
    if path is None:
        name = Path(model).name
        try:
            config = Config.from_name(name)
        except ValueError as error:
            raise ValueError(
                f"{str(model)!r} is neither a folder, nor a file, nor the name of a model: {error}"
            ) from None
        return MemoryPlan(config, spec, dtype, scheme, is_tied(name), chunk)
    checkpoint: Checkpoint = open_checkpoint(path)
    if checkpoint.quantization is not None and scheme is not None:
        raise ValueError(f"{path} is quantised already ({checkpoint.quantization.mode}): leave out --quantize")
    return MemoryPlan(checkpoint.config, spec, dtype, checkpoint.quantization or scheme, checkpoint.tied, chunk)


def parse_bytes(text: str) -> int:
    """The number of bytes that 24GB, 1.5 GiB, 512MB or a plain number means.

    Raises:
        ValueError: if it means none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]I?)B?|B?)\s*", str(text).upper())
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no size of memory: write it as 24GB, 16GiB or 512MB")
    size = int(float(found[1]) * _UNITS[found[2] or ""])
    if size < 1000:
        raise ValueError(f"{text!r} is a size of {size} bytes: write it with its unit, as {found[1]}GB")
    return size


def measured_bandwidth() -> float:
    """Bytes a second at which this machine's CPU reads its memory, or its first GPU its own; takes a tenth of a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.ones(64 << 20, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        data.sum().item()
        seconds.append(time.perf_counter() - began)
    return data.numel() * data.element_size() / min(seconds)
