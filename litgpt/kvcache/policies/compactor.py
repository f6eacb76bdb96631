"""Keep tokens that their neighbours attend to, and those whose keys no others replace (arXiv:2507.08143)."""

from dataclasses import dataclass

import torch

from litgpt.attention import do_softcapping
from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens

CHUNK = 256  # tokens that attend to each other


@register_policy("compactor")
@dataclass(frozen=True)
class CompactorPolicy(ScorePolicy):
    """Attention that is not causal, within chunks of a prompt or the tail, times the norm of the value; and the leverage of the key
    before RoPE among all keys ("Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
    here with exact ones). Both as standard scores. Independent of a question. Needs all queries, keys, values, and a number for
    every token; costs little, but works best with a long prompt in one call or a long tail.

    Args:
        leverage: weight of the leverage.
    """

    leverage: float = 0.5

    slot_state = 1
    unrotates = True

    def observe(self, tokens: CachedTokens) -> None:
        queries, n = tokens.over_group(tokens.queries), tokens.queries.shape[2]
        own = tokens.keys[:, :, None, tokens.shape[2] - n :]  # of the same tokens
        for start in range(0, n, CHUNK):
            chunk = slice(start, start + CHUNK)
            scores = queries[:, :, :, chunk] @ own[:, :, :, chunk].mT * tokens.mha.scale
            seen = do_softcapping(scores, tokens.mha.softcapping).softmax(-1).sum((2, 3))
            first = tokens.shape[2] - n + start
            tokens.slot_state[0, :, :, first : first + seen.shape[-1]] = seen

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        keys = tokens.unrotated_keys
        products = keys.mT @ keys
        ridge = 1e-4 * products.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        root, _ = torch.linalg.cholesky_ex(products + ridge * torch.eye(keys.shape[-1], device=keys.device))
        leverage = (keys.mT * torch.cholesky_solve(keys.mT, root)).sum(-2)
        return _standard(tokens.slot_state[0] * tokens.values.norm(dim=-1)) + self.leverage * _standard(leverage)


def _standard(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
