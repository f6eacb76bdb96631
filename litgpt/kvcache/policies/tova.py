"""Keep the tokens that the last query attends to (arXiv:2401.06104)."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("tova")
@dataclass(frozen=True)
class TOVAPolicy(ScorePolicy):
    """The last query's attention weights, averaged over all heads, which keep the same tokens ("Transformers are Multi-State
    RNNs"). Needs the last query of every head; costs one row of attention an eviction."""

    n_queries = 1

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        return tokens.summed_weights(last=1).mean(1, keepdim=True)
