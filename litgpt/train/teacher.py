"""Self-distillation: a model as it was before training, with a cache that keeps everything, teaches the one with another cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.train.cached_layers import CachedLayers


class Teacher:
    """`gpt` as it is now, whatever is trained later: a copy of what is trained stays, which for LoRA and adapters is small and
    changes nothing yet, and for full fine-tuning is all weights. `chunk` tokens of a row go through a layer together."""

    def __init__(self, gpt: GPT, chunk: int) -> None:
        self.gpt, self.layers = gpt, CachedLayers(gpt, CacheSpec("dense"), chunk)
        self.own = [(p, p.detach().clone()) for p in gpt.parameters() if p.requires_grad]

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, row_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Final-norm outputs: see `CachedLayers`."""
        with self._in_place():
            return self.layers(input_ids, row_sizes)

    @torch.no_grad()
    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of outputs (n, E)."""
        with self._in_place():
            return self.gpt.logits(outputs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let the model be what it was, without dropout."""
        self.own = [(p, first.to(p.device)) for p, first in self.own]  # the model may have been moved since
        learned = [p.data for p, _ in self.own]
        training = [module for module in self.gpt.modules() if module.training]
        try:
            for p, first in self.own:
                p.data = first
            self.gpt.eval()
            yield
        finally:
            for (p, _), now in zip(self.own, learned, strict=True):
                p.data = now
            for module in training:
                module.training = True
