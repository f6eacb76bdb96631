"""A folder in the layout of LitGPT: `model_config.yaml` and `lit_model.pth`."""

from collections.abc import Iterator
from functools import cached_property

import torch

from litgpt.checkpoint.base import CONFIG_NAME, EMBEDDING, HEAD, WEIGHTS_NAME, Checkpoint, Piece
from litgpt.checkpoint.files import load_state_dict, read_tensors
from litgpt.checkpoint.weights import split_interleaved
from litgpt.config import Config


class LitGPTCheckpoint(Checkpoint):
    """What LitGPT and this package write. The weights are opened when first asked for."""

    @cached_property
    def config(self) -> Config:
        try:
            return Config.from_checkpoint(self.path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{str(self.path)!r} holds {WEIGHTS_NAME} but no {CONFIG_NAME}") from None

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(tensor.dtype for _, tensor in self._stored() if tensor.is_floating_point())

    @cached_property
    def tied(self) -> bool:
        """Whether the two embeddings are one tensor in the file, or equal: LitGPT stores some tied ones twice."""
        weights = load_state_dict(self.path / WEIGHTS_NAME)
        embedding, head = weights.get(EMBEDDING), weights.get(HEAD)
        if embedding is None or head is None:
            return False
        return embedding.data_ptr() == head.data_ptr() or torch.equal(embedding, head)

    def _stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        return read_tensors(self.path / WEIGHTS_NAME)

    def pieces(self, meta: bool = False) -> Iterator[Piece]:
        for name, tensor in self._stored():
            value = tensor.to("meta") if meta else tensor
            if ".attn.attn." in name:  # before 0.5.3: rows alternate by head group
                yield from split_interleaved(name.replace(".attn.attn.", ".attn.qkv."), value, self.config)
            else:
                yield name, 0, value

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._stored():
            if ".attn.attn." in name:
                parts = split_interleaved(name, tensor, self.config)
                yield name.replace(".attn.attn.", ".attn.qkv."), torch.cat([part for _, _, part in parts])
            else:
                yield name, tensor
