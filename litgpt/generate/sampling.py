"""From logits to tokens."""

from collections.abc import Sequence
from typing import Any

import torch


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> None:
    """Raise `ValueError` for values that sampling cannot mean anything by."""
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0 (0: always the likeliest token), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 (None: no limit), got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be in 0..1 (1: no limit), got {top_p}")


def multinomial_num_samples_1(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One index for each row of probabilities (..., V), as (..., 1)."""
    flat = probs.reshape(-1, probs.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(*probs.shape[:-1], 1)


def sample_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (..., V) with all set to -inf but the likeliest tokens whose probabilities first add up to `top_p`
    (nucleus sampling, arXiv:1904.09751). The likeliest one always stays."""
    ordered, order = torch.sort(logits, descending=True)
    probs = ordered.softmax(dim=-1)
    outside = probs.cumsum(dim=-1) - probs >= top_p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), float("-inf"))


def sample_rows(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token for each row of logits (B, V): (B,) int64. All rows share the settings.

    The order is top-k, temperature, top-p, and then a draw; `temperature=0` takes the likeliest token.
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1)
    logits, tokens = logits.float(), None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, tokens = torch.topk(logits, top_k)
    logits = logits / temperature
    if top_p < 1:
        logits = sample_top_p(logits, top_p)
    drawn = multinomial_num_samples_1(logits.softmax(dim=-1), generator)
    return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)


def sample(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> torch.Tensor:
    """One token from the logits of the last position: (V,), (T, V) or (1, T, V) give (1,); (B, T, V) gives (B,).

    Args:
        logits: of any dtype.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens whose probabilities add up to this.

    Raises:
        ValueError: for a negative temperature, top_k < 1, or top_p outside 0..1.
    """
    check_sampling(temperature, top_k, top_p)
    last = logits[None] if logits.ndim == 1 else logits[..., -1, :].reshape(-1, logits.shape[-1])
    return sample_rows(last, temperature, top_k, top_p)


def batched_sample(logits: Sequence[torch.Tensor], kwargs: Sequence[dict[str, Any]]) -> torch.Tensor:
    """One token for each of B logits, each with its own `sample` arguments: (B, 1) int64."""
    if len(logits) != len(kwargs):
        raise ValueError(f"{len(logits)} logits but {len(kwargs)} sets of sampling arguments")
    return torch.stack([sample(row, **args) for row, args in zip(logits, kwargs, strict=True)])
