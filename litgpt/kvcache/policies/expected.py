"""Keep tokens that future queries are expected to attend to (arXiv:2510.00636)."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("expected")
@dataclass(frozen=True)
class ExpectedAttentionPolicy(ScorePolicy):
    """The weight that a normally distributed query gives to a key, with the mean and covariance of all queries so far before
    RoPE, rotated to the next `future` positions on average; times the norm of the value ("Expected Attention: KV Cache
    Compression by Estimating Attention from Future Queries Distribution"). Independent of a question. Needs all queries, keys
    and values, and a matrix for every head and row; costs an outer product a query.

    Args:
        future: number of next positions.
    """

    future: int = 512

    unrotates = True

    @classmethod
    def row_state(cls, params: KVCacheParams) -> int:
        return 1 + params.head_size + params.head_size**2

    def observe(self, tokens: CachedTokens) -> None:
        queries = tokens.unrotated_queries
        beginning = (tokens.query_positions < self.n_sink)[
            :, None, :, None
        ]  # of another kind, as the tokens themselves
        queries = queries.masked_fill(beginning, 0)
        count = (~beginning).float().sum(2).expand(*queries.shape[:2], 1)
        sums = torch.cat((count, queries.sum(2), (queries.mT @ queries).flatten(2)), dim=-1)
        tokens.row_state = tokens.row_state + sums

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        D = tokens.keys.shape[-1]
        count, mean, square = tokens.row_state.split((1, D, D * D), dim=-1)
        count = count.clamp(min=1)
        mean, square = mean / count, (square / count).unflatten(-1, (D, D))
        rotation = tokens.mean_rotation(self.future)  # (B, D, D)
        covariance = rotation[:, None] @ (square - mean[..., :, None] * mean[..., None, :]) @ rotation[:, None].mT
        mean = (rotation[:, None] @ mean[..., None]).squeeze(-1)
        keys, scale = tokens.keys[:, :, None], tokens.mha.scale  # for every head of a group
        mean, covariance = tokens.over_group(mean), tokens.over_group(covariance)
        logits = (keys @ mean[..., None]).squeeze(-1) * scale
        logits = logits + ((keys @ covariance) * keys).sum(-1) * scale**2 / 2
        logits = logits.masked_fill((tokens.positions < self.n_sink)[:, :, None], -torch.inf)  # which stay anyway
        return logits.softmax(-1).mean(2) * tokens.values.norm(dim=-1)
