"""Keep the tokens that all queries so far attend to: the heavy hitters (arXiv:2306.14048)."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("h2o")
@dataclass(frozen=True)
class H2OPolicy(ScorePolicy):
    """The attention weights of all queries, summed over them and the heads that share keys ("H2O: Heavy-Hitter Oracle"). As in
    the paper, half of what stays are the newest tokens. Needs all queries and a number for every token; costs a second product
    of queries and keys, also of the whole prompt.

    Args:
        value_norm: multiply the sums by the norms of values, after "Attention Score is not All You Need for Token Importance
            Indicator in KV Cache Reduction" (arXiv:2406.12335).
    """

    value_norm: bool = False

    slot_state = 1

    def _default_recent(self) -> int:
        return max(1, self.kept // 2)

    def observe(self, tokens: CachedTokens) -> None:
        tokens.slot_state = tokens.slot_state + tokens.summed_weights()

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        sums = tokens.slot_state[0]
        return sums * tokens.values.norm(dim=-1) if self.value_norm else sums

    @property
    def pooled(self) -> int | None:
        return None if self.value_norm else 1
