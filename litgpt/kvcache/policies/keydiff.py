"""Keep tokens whose keys differ from the others (arXiv:2504.15364)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("keydiff")
@dataclass(frozen=True)
class KeyDiffPolicy(ScorePolicy):
    """A key's score is minus its cosine similarity to the mean direction of all keys ("KeyDiff: Key Similarity-Based KV Cache
    Eviction"). Needs keys; costs next to nothing."""

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        directions = F.normalize(tokens.keys, dim=-1)
        return -F.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1)
