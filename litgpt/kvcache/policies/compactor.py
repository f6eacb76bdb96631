"""Keep tokens that their neighbours attend to, and those whose keys no others replace (arXiv:2507.08143)."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from litgpt.attention import do_softcapping
from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens

CHUNK, DIRECTIONS = 256, 48  # tokens that attend to each other; in all directions of a large head, keys have their own


@register_policy("compactor")
@dataclass(frozen=True)
class CompactorPolicy(ScorePolicy):
    """Attention that is not causal, in chunks of a prompt or the tail, times the norm of the value, and the leverage of the key
    before RoPE, in a head's random directions ("Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage
    Scores"), as standard scores. Needs all queries, keys, values and a number a token; best with long prompts in one call.

    Args:
        leverage: weight of the leverage (None: one and a half times the share of the tokens so far that do not stay).
    """

    leverage: float | None = None

    slot_state = 1
    unrotates = True

    def observe(self, tokens: CachedTokens) -> None:
        queries, first = tokens.over_group(tokens.queries), tokens.shape[2] - tokens.queries.shape[2]
        for start in range(max(first, self.n_sink), tokens.shape[2], CHUNK):  # the first would take all weight
            own, chunk = slice(start - first, start - first + CHUNK), slice(start, start + CHUNK)
            scores = queries[..., own, :] @ tokens.keys[:, :, None, chunk].mT * tokens.mha.scale
            tokens.slot_state[0, :, :, chunk] = do_softcapping(scores, tokens.mha.softcapping).softmax(-1).sum((2, 3))

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        may_go = slice(self.n_sink, tokens.shape[2] - self.recent)  # the others stay, and are not what is usual
        keys = tokens.unrotated_keys[:, :, may_go]
        keys = (keys - keys.mean(-2, keepdim=True)) @ _directions(tokens.block_idx, *keys.shape[1::2], keys.device)
        products = keys.mT @ keys * (1 + 1e-4 * torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device))
        leverage = (keys.mT * torch.cholesky_solve(keys.mT, torch.linalg.cholesky_ex(products).L)).sum(-2)
        seen = tokens.slot_state[0, :, :, may_go] * tokens.values.norm(dim=-1)[:, :, may_go]
        weight = 1.5 - 1.5 * self.kept / (tokens.positions[..., -1:] + 1) if self.leverage is None else self.leverage
        return F.pad(_standard(seen) + weight * _standard(leverage), (self.n_sink, self.recent))


@functools.lru_cache(256)
def _directions(block_idx: int, heads: int, size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(block_idx)
    return torch.randn(heads, size, DIRECTIONS, generator=generator, dtype=torch.float32).to(device)


def _standard(x: torch.Tensor) -> torch.Tensor:
    deviation, mean = torch.std_mean(x, dim=(1, 2), correction=0, keepdim=True)
    return (x - mean) / (deviation + 1e-3)  # less is rounding
