"""Keep the tokens that the last queries attend to (arXiv:2404.14469)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("snapkv")
@dataclass(frozen=True)
class SnapKVPolicy(ScorePolicy):
    """The attention weights of the last `window` queries on what stands before them, averaged over the queries, the heads that
    share keys, and `pool` neighbours ("SnapKV: LLM Knows What You are Looking for Before Generation"). At its best where the
    question is at the end of the prompt. Needs `window` queries of every head; costs as many rows of attention an eviction.

    Args:
        window: number of queries.
        pool: number of neighbouring tokens, odd.
    """

    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("window", 1, None)
        self._check("pool", 1, None)
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, got {self.pool}")

    @property
    def n_queries(self) -> int:
        return min(self.window, self.cache_length)

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        weights = tokens.summed_weights(last=self.n_queries)
        before, own = weights.split((weights.shape[-1] - self.recent, self.recent), dim=-1)
        return torch.cat((F.avg_pool1d(before, self.pool, stride=1, padding=self.pool // 2), own), dim=-1)

    @property
    def pooled(self) -> int | None:
        return self.pool
