"""Perplexity of a text under a cache, and how far its predictions are from those of a cache that keeps everything."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from litgpt.api import LLM
from litgpt.comparison.figure import Figure
from litgpt.kvcache import CacheSpec

PREDICTED = 4  # the last quarter of a window is predicted
CHUNK = 64  # tokens predicted by a call; caches evict at the same positions for any number


@dataclass
class Predictions:
    """What is known of every predicted token.

    Attributes:
        losses: negative log-probability of the token, in nats.
        dense_losses: the same with the cache that keeps everything.
        divergences: KL divergence of the prediction from that one's, in nats.
        same_top: 1.0 where both have the same likeliest token, else 0.0.
    """

    losses: list[float] = field(default_factory=list)
    dense_losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    same_top: list[float] = field(default_factory=list)

    def add(self, logits: torch.Tensor, dense: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add predictions (n, V) of tokens (n,)."""
        q, p = (x.float().log_softmax(-1) for x in (logits, dense))
        self.losses += (-q.gather(1, tokens[:, None])[:, 0]).tolist()
        self.dense_losses += (-p.gather(1, tokens[:, None])[:, 0]).tolist()
        divergences = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
        self.divergences += divergences.clamp(min=0.0).tolist()  # rounding may leave a little less
        self.same_top += (q.argmax(-1) == p.argmax(-1)).float().tolist()

    def figures(self) -> dict[str, Figure]:
        """Perplexity, its ratio to the dense one, mean and 99th percentile of the divergences, share of equal top tokens."""
        ratio = [loss - dense for loss, dense in zip(self.losses, self.dense_losses, strict=True)]
        last_percent = torch.tensor(self.divergences, dtype=torch.float64).quantile(0.99).item()
        return {
            "perplexity": Figure.mean(self.losses).exp(),
            "perplexity_ratio": Figure.mean(ratio).exp(),
            "kl": Figure.mean(self.divergences),
            "kl_99": Figure.exact(last_percent),
            "same_top": Figure.share(self.same_top),
        }


def predict(
    llm: LLM, spec: CacheSpec, windows: Sequence[Sequence[int]], prompt_chunksize: int | None = None
) -> Predictions:
    """Predict the last quarter of every window of a text, token by token after the right ones, under the caches of `spec`.

    The first three quarters enter as a prompt.
    """
    found = Predictions()
    for window in windows:
        kept = CacheSpec(cache_length=len(window))
        sessions = [llm.session(kind, prompt_chunksize=prompt_chunksize) for kind in (spec, kept)]
        start = len(window) - max(1, len(window) // PREDICTED)
        for session in sessions:
            session.extend(window[:start])
        for i in range(start, len(window), CHUNK):
            tokens = window[i : i + CHUNK]
            logits, dense = (session.predict(tokens) for session in sessions)
            found.add(logits, dense, torch.tensor(tokens, device=logits.device))
    return found


def windows_of(tokens: Sequence[int], length: int, most: int) -> list[Sequence[int]]:
    """Up to `most` parts of `length` tokens, spread evenly over the text.

    Raises:
        ValueError: if the text is shorter than one.
    """
    fitting = len(tokens) // length
    if not fitting:
        raise ValueError(f"the text has {len(tokens):,} tokens, fewer than the length of {length:,}: give a longer one")
    count = min(most, fitting)
    starts = [i * fitting // count * length for i in range(count)]
    return [tokens[start : start + length] for start in starts]
