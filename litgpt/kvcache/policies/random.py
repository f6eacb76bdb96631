"""Keep a random sample of the tokens."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("random")
@dataclass(frozen=True)
class RandomPolicy(ScorePolicy):
    """Every token has a random score of its own, by position, head and `seed`, so that what stays is a uniform sample of the whole
    sequence. The least that another policy has to beat. Needs nothing; costs nothing."""

    seed: int = 0

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        _, G, _ = tokens.shape
        head = (
            torch.arange(G, device=tokens.positions.device).view(1, G, 1) + (tokens.block_idx << 10) + (self.seed << 20)
        )
        x = tokens.positions * 0x9E3779B1 + head * 0x85EBCA77  # a hash of integers that is the same on every device
        for multiplier in (0x7FEB352D, 0x846CA68B):
            x = (x ^ (x >> 16)) * multiplier & 0xFFFFFFFF
        return ((x ^ (x >> 16)) >> 8).float()
