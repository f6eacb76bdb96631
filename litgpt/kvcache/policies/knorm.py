"""Keep tokens with small keys (arXiv:2406.11430)."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("knorm")
@dataclass(frozen=True)
class KNormPolicy(ScorePolicy):
    """Keys of small norm get much attention from later queries ("A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression"). Needs keys; costs next to nothing."""

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        return -tokens.keys.norm(dim=-1)
