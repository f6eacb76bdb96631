"""Keep the last tokens, and if asked the first few: attention sinks (arXiv:2309.17453)."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.policies.base import PositionalPolicy, register_policy


@register_policy("lastrec")
@dataclass(frozen=True)
class LastRecentPolicy(PositionalPolicy):
    """The first `n_sink` tokens keep the first slots; the others go round the rest, each replacing the oldest."""

    n_sink: int = 0

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        if not self.n_sink:
            return positions % self.cache_length
        return torch.where(positions < self.n_sink, positions, self.n_sink + (positions - self.n_sink) % self.reach)
