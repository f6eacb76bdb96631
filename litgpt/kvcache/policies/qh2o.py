"""Keep heavy hitters that the storage keeps well: H2O for quantised storages."""

from dataclasses import dataclass

import torch

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.h2o import H2OPolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("qh2o")
@dataclass(frozen=True)
class QuantizationAwareH2OPolicy(H2OPolicy):
    """H2O's sums minus what keys and values lose in a quantised storage, both between 0 and 1 among the tokens at hand, after the
    policy of that name in the library keys_values. A storage's scales say what is lost. Needs and costs what H2O does; with a
    storage that loses nothing it is H2O.

    Args:
        error_weight: weight of the error.
    """

    error_weight: float = 0.5

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        return _normalized(super().scores(tokens)) - self.error_weight * _normalized(tokens.quantization_errors)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    least, most = x.aminmax(dim=-1, keepdim=True)
    return (x - least) / (most - least).clamp(min=1e-12)
