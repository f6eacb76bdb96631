"""A folder with quantised weights: `model_config.yaml` and `lit_model_quantized.safetensors`."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from litgpt.checkpoint.base import EMBEDDING, HEAD, QUANTIZED_NAME, RowShard
from litgpt.checkpoint.files import open_safetensors, parse_dtype
from litgpt.checkpoint.litgpt_folder import LitGPTCheckpoint
from litgpt.runners.quantized_weights import Scheme, dequantize_int4, dequantize_int8


class QuantizedCheckpoint(LitGPTCheckpoint):
    """A folder that `litgpt quantize` wrote: the state dict of a quantised model, and in its header its quantisation.

    `stored` has the quantised tensors, for a quantised model; `row_shards` and `tensors` dequantise them to float32, one
    matrix at a time. Raises `ValueError` for a file of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, QUANTIZED_NAME)
        about = open_safetensors(self.files[0]).metadata() or {}
        try:
            self.quantization = Scheme(about["quantization"], int(about["group_size"]))
            self.dtype = parse_dtype(about["dtype"])
        except KeyError as error:
            raise ValueError(f"{self.files[0]} does not say how it is quantised: no {error} in its header") from None

    @cached_property
    def tied(self) -> bool:
        return all(name != HEAD for name, _ in self._stored())

    def stored(self, meta: bool = False) -> Iterator[RowShard]:
        return super().row_shards(meta)

    def row_shards(self, meta: bool = False) -> Iterator[RowShard]:
        stored = dict(self._stored())
        for name, tensor in stored.items():
            if name.endswith((".scale", ".minimum")):
                continue
            value = tensor.to("meta") if meta else tensor
            if not tensor.is_floating_point():
                module = name.removesuffix(".weight")
                value = _dequantized(value, stored[f"{module}.scale"], stored.get(f"{module}.minimum"))
            yield name, 0, value
            if self.tied and name == EMBEDDING:
                yield HEAD, 0, value


def _dequantized(weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
    """A weight in float32, on the meta device if it is there."""
    if weight.is_meta:
        return torch.empty(len(weight), weight.shape[1] * (1 if minimum is None else 2), device="meta")
    if minimum is None:
        return dequantize_int8(weight, scale, torch.float32)
    return dequantize_int4(weight, scale, minimum, torch.float32)
