"""Keep every token: the policy that changes nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from litgpt.kvcache.policies.base import PositionalPolicy, register_policy


@register_policy("dense")
@dataclass(frozen=True)
class DensePolicy(PositionalPolicy):
    """Token p takes slot p. When all slots are taken, nothing more can be stored."""

    evicts: ClassVar[bool] = False

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        return positions
