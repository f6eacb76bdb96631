"""Keep tokens that their neighbours attend to, and those whose keys no others replace (arXiv:2507.08143)."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from litgpt.attention import do_softcapping
from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens

CHUNK = 256  # tokens that attend to each other
DIRECTIONS = 48  # in all those of a large head, every key has some of its own


@register_policy("compactor")
@dataclass(frozen=True)
class CompactorPolicy(ScorePolicy):
    """Attention that is not causal, within chunks of a prompt or the tail, times the norm of the value; and the leverage of the key
    before RoPE among all keys, in some random directions ("Compactor: Calibrated Query-Agnostic KV Cache Compression with
    Approximate Leverage Scores"). Both as standard scores, over all heads. Independent of a question. Needs all queries, keys,
    values, and a number for every token; costs little, but works best with a long prompt in one call or a long tail.

    Args:
        leverage: weight of the leverage (None: the share of the tokens so far that do not stay).
    """

    leverage: float | None = None

    slot_state = 1
    unrotates = True

    def observe(self, tokens: CachedTokens) -> None:
        queries, first = tokens.over_group(tokens.queries), tokens.shape[2] - tokens.queries.shape[2]
        for start in range(max(first, self.n_sink), tokens.shape[2], CHUNK):  # the first would take all weight
            chunk = slice(start, start + CHUNK)
            own = queries[:, :, :, start - first : start - first + CHUNK]
            scores = own @ tokens.keys[:, :, None, chunk].mT * tokens.mha.scale
            seen = do_softcapping(scores, tokens.mha.softcapping).softmax(-1).sum((2, 3))
            tokens.slot_state[0, :, :, chunk] = seen

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        may_go = slice(self.n_sink, tokens.shape[2] - self.recent)  # the others stay, and are not what is usual
        keys = tokens.unrotated_keys[:, :, may_go]
        keys = (keys - keys.mean(-2, keepdim=True)) @ _directions(keys.shape[-1], keys.device)
        products = keys.mT @ keys
        ridge = 1e-4 * products.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        root, _ = torch.linalg.cholesky_ex(products + ridge * torch.eye(keys.shape[-1], device=keys.device))
        leverage = (keys.mT * torch.cholesky_solve(keys.mT, root)).sum(-2)
        seen = (tokens.slot_state[0] * tokens.values.norm(dim=-1))[:, :, may_go]
        gone = 1 - self.kept / (tokens.positions[..., -1:] + 1)
        weight = gone if self.leverage is None else self.leverage
        return F.pad(_standard(seen) + weight * _standard(leverage), (self.n_sink, self.recent))


@functools.lru_cache(8)
def _directions(size: int, device: torch.device) -> torch.Tensor:
    return torch.randn(size, DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(device)


def _standard(x: torch.Tensor) -> torch.Tensor:
    deviation, mean = torch.std_mean(x, dim=(1, 2), correction=0, keepdim=True)
    return (x - mean) / (deviation + 1e-3)  # less is rounding
