"""Keep tokens that come back after long pauses (arXiv:2506.15969)."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("lazy")
@dataclass(frozen=True)
class LazyPolicy(ScorePolicy):
    """In long reasoning, tokens matter again and again after pauses. A token's score is minus the time since a query last
    attended to it, divided by its longest pause so far ("LazyEviction: Lagged KV Eviction with Attention Pattern Observation
    for Efficient Long Reasoning"). Needs all queries and two numbers for every token; costs a second product of queries and
    keys, also of the whole prompt.

    Args:
        threshold: attention weight from which a query attends to a token, in one of the heads that share keys.
    """

    threshold: float = 1e-4

    slot_state = 2

    def observe(self, tokens: CachedTokens) -> None:
        last, pause = tokens.slot_state
        last = torch.maximum(last, tokens.positions)  # a token has its own query at least
        for positions, weights in tokens.weights():
            hit = tokens.over_group(weights).amax(2) > self.threshold
            at = torch.where(hit, positions[:, None, :, None].float(), -1)
            latest = torch.maximum(at.cummax(2).values, last[:, :, None])
            before = torch.cat((last[:, :, None], latest[:, :, :-1]), dim=2)
            pause = torch.maximum(pause, torch.where(hit, at - before, 0).amax(2))
            last = latest[:, :, -1]
        tokens.slot_state = torch.stack((last, pause))

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        last, pause = tokens.slot_state
        now = last.amax(-1, keepdim=True)
        return (last - now) / (pause + 1)
