"""A folder in the layout of LitGPT: `model_config.yaml` and `lit_model.pth`."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from litgpt.checkpoint.base import CONFIG_NAME, EMBEDDING, HEAD, WEIGHTS_NAME, Checkpoint, RowShard
from litgpt.checkpoint.files import load_state_dict, read_tensors
from litgpt.checkpoint.weights import split_interleaved
from litgpt.config import Config


class LitGPTCheckpoint(Checkpoint):
    """A folder that LitGPT or this package wrote. The weights are opened when they are first used.

    Args:
        path: The folder.
        weights_name: The file of weights in it.
        config: The architecture (default: the folder's).
    """

    def __init__(self, path: str | Path, weights_name: str = WEIGHTS_NAME, config: Config | None = None) -> None:
        super().__init__(path)
        self.files = [self.path / weights_name]
        if config is not None:
            self.config = config

    @cached_property
    def config(self) -> Config:
        try:
            return Config.from_checkpoint(self.path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{str(self.path)!r} holds {self.files[0].name} but no {CONFIG_NAME}") from None

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(tensor.dtype for _, tensor in self._stored() if tensor.is_floating_point())

    @cached_property
    def tied(self) -> bool:
        """Whether the two embeddings are one tensor in the file, or equal: LitGPT stores some tied embeddings twice."""
        weights = load_state_dict(self.files[0])
        embedding, head = weights.get(EMBEDDING), weights.get(HEAD)
        if embedding is None or head is None:
            return False
        return embedding.data_ptr() == head.data_ptr() or torch.equal(embedding, head)

    def _stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        return read_tensors(self.files[0])

    def row_shards(self, meta: bool = False) -> Iterator[RowShard]:
        for name, tensor in self._stored():
            value = tensor.to("meta") if meta else tensor
            if ".attn.attn." in name:  # before 0.5.3: rows alternate by head group
                yield from split_interleaved(name.replace(".attn.attn.", ".attn.qkv."), value, self.config)
            else:
                yield name, 0, value
