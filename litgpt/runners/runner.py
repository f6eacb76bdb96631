"""The protocol of faster ways to run all layers of a model."""

from collections.abc import Sequence
from typing import Protocol

import torch

from litgpt.kvcache import KVCache
from litgpt.kvcache.plan import Plan
from litgpt.rope import Rope


class LayerRunner(Protocol):
    """A model's `layer_runner`: runs embedding, layers and final norm as `GPT.run_layers` does, for calls with caches.

    Attributes:
        static_shapes: whether decode steps need plans with constant shapes as sequences grow.
        runs_head: whether calls may ask for what `lm_head` gives.
    """

    static_shapes: bool
    runs_head: bool

    def __call__(
        self,
        idx: torch.Tensor,
        rope: list[Rope],
        plans: list[Plan],
        input_pos: int,
        output_tokens: Sequence[int] | None = None,
        head: bool = False,
    ) -> torch.Tensor | None:
        """Outputs (B, T, E) for tokens `idx` (B, T), or of `output_tokens` only, (len(output_tokens), 1, E); with `head`, what `lm_head`
        gives for them.

        Args:
            idx, rope, plans, input_pos: as for `GPT.run_layers`.
            output_tokens: ascending indices of tokens of all rows, flattened (None: all).

        Returns:
            None if the call is not supported; no cache is changed, and the model runs its layers itself.
        """
        ...

    def runs_evictions(self, caches: Sequence[KVCache]) -> bool:
        """Whether calls with many tokens may go on where such a cache evicts by score: others are best cut there."""
        ...
