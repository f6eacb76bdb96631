"""A folder with quantised weights: `model_config.yaml` and `lit_model_quantized.safetensors`."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from litgpt.checkpoint.base import EMBEDDING, HEAD, QUANTIZED_NAME, Piece
from litgpt.checkpoint.files import parse_dtype
from litgpt.checkpoint.litgpt_folder import LitGPTCheckpoint
from litgpt.git_lfs import refuse_lfs_pointer
from litgpt.runners.quantized_weights import Scheme, dequantize_int4, dequantize_int8


class QuantizedCheckpoint(LitGPTCheckpoint):
    """What `litgpt quantize` writes: the state dict of a quantised model, and in its header how it is quantised.

    A model that is quantised takes the tensors as they are, by `stored`; `pieces` and `tensors` give what they stand for,
    in float32, one matrix at a time. Raises `ValueError` for a file of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, QUANTIZED_NAME)
        refuse_lfs_pointer(self.files[0])
        try:
            with safe_open(self.files[0], framework="pt") as file:
                self._about = file.metadata() or {}
            self.quantization = Scheme(self._about["quantization"], int(self._about["group_size"]))
            self._dtype = parse_dtype(self._about["dtype"])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.files[0]} is damaged or incomplete: {' '.join(str(error).split())}") from None
        except KeyError as error:
            raise ValueError(f"{self.files[0]} does not say how it is quantised: no {error} in its header") from None

    @cached_property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @cached_property
    def tied(self) -> bool:
        return all(name != HEAD for name, _ in self._stored())

    def stored(self, meta: bool = False) -> Iterator[Piece]:
        for name, tensor in self._stored():
            yield name, 0, tensor.to("meta") if meta else tensor

    def pieces(self, meta: bool = False) -> Iterator[Piece]:
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

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, _, tensor in self.pieces():
            yield name, tensor


def _dequantized(weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
    """In float32; without values if the weight has none."""
    if weight.is_meta:
        return torch.empty(len(weight), weight.shape[1] * (1 if minimum is None else 2), device="meta")
    if minimum is None:
        return dequantize_int8(weight, scale, torch.float32)
    return dequantize_int4(weight, scale, minimum, torch.float32)
