"""From logits to tokens."""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch

LogitsProcessor = Callable[[Sequence[int], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are drawn.

    The order is: penalties, `logit_bias`, `processors`, then top-k, temperature, top-p, min-p, and a draw.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens whose probabilities add up to this (nucleus sampling, arXiv:1904.09751).
        min_p: draw from tokens that are at least this times as likely as the likeliest one (arXiv:2407.01082).
        repetition_penalty: logits of tokens that the prompt or the output has are divided by it where they are positive,
            else multiplied (arXiv:1909.05858).
        presence_penalty: taken off the logits of tokens that the output has.
        frequency_penalty: taken off the logits of tokens of the output for every time that they are there.
        logit_bias: added to the logits of tokens, {token: bias}.
        seed: of a generator of this sequence's own, which draws the same whatever else is generated beside it.
        processors: called as `(tokens so far, logits (V,) float32)`, prompt included; return logits (V,). Every sequence
            gets copies (`copy.copy`) of its own, so they may keep what they know about it from call to call.

    Raises:
        ValueError: for values that mean nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    processors: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0 (0: always the likeliest token), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (None: no limit), got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be in 0..1 (1: no limit), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in 0..1 (0: no limit), got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive (1: none), got {self.repetition_penalty}")
        for name, value in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            if not math.isfinite(value):
                raise ValueError(f"{name}_penalty must be a number (0: none), got {value}")
        for token, bias in (self.logit_bias or {}).items():
            if not (isinstance(token, Integral) and token >= 0 and isinstance(bias, Real) and bias < math.inf):
                raise ValueError(f"logit_bias takes tokens (0, 1, ...) and numbers, got {token!r}: {bias!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed, in ways that depend on the tokens so far or on the token."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.processors
        )

    def adjust(self, logits: torch.Tensor, tokens: Sequence[int], prompt_length: int) -> torch.Tensor:
        """Logits (V,) float32 after penalties, bias and processors, given the tokens so far, prompt first."""
        if not self.adjusts:
            return logits.float()
        logits = logits.to(torch.float32, copy=True)

        def index(tokens: Sequence[int]) -> torch.Tensor:
            return torch.tensor(tokens, dtype=torch.int64, device=logits.device)

        if self.repetition_penalty != 1:
            seen = index(tokens)
            found = logits[seen]
            logits[seen] = torch.where(found > 0, found / self.repetition_penalty, found * self.repetition_penalty)
        if self.presence_penalty or self.frequency_penalty:
            output, counts = index(tokens[prompt_length:]).unique(return_counts=True)
            logits[output] -= self.presence_penalty + self.frequency_penalty * counts
        if self.logit_bias:
            logits[index(list(self.logit_bias))] += torch.tensor(list(self.logit_bias.values()), device=logits.device)
        for process in self.processors:
            logits = process(tokens, logits)
        return logits


@dataclass(eq=False)
class Draws:
    """What drawing the tokens of one sequence needs: the settings, the tokens so far, and chance.

    Args:
        sampling: the settings.
        tokens: the sequence so far, prompt first. Whoever draws appends.
        prompt_length: tokens of the prompt.
    """

    sampling: Sampling
    tokens: list[int]
    prompt_length: int

    def __post_init__(self) -> None:
        self.random = None if self.sampling.seed is None else random.Random(self.sampling.seed)
        if self.sampling.processors:
            self.sampling = replace(self.sampling, processors=tuple(map(copy.copy, self.sampling.processors)))

    def uniform(self) -> float:
        """The next random number, in [0, 1)."""
        # 32 bits: as a float64 it stays below 1 when it is multiplied with a sum near 1
        return torch.rand(()).item() if self.random is None else self.random.getrandbits(32) / 2**32


def draw(logits: torch.Tensor, rows: Sequence[Draws]) -> torch.Tensor:
    """One token for each row of logits (B, V): (B,) int64. Rows with equal settings are drawn at once."""
    if any(row.sampling.adjusts for row in rows):
        logits = torch.stack(
            [row.sampling.adjust(x, row.tokens, row.prompt_length) for x, row in zip(logits, rows, strict=True)]
        )
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        s = row.sampling
        groups["greedy" if s.is_greedy else (s.temperature, s.top_k, s.top_p, s.min_p)].append(i)
    if len(groups) == 1:
        return _draw_alike(logits, rows)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for members in groups.values():
        index = torch.tensor(members, device=logits.device)
        tokens[index] = _draw_alike(logits[index], [rows[i] for i in members])
    return tokens


def _draw_alike(logits: torch.Tensor, rows: Sequence[Draws]) -> torch.Tensor:
    """`draw` for rows with the same settings."""
    if rows[0].sampling.is_greedy:
        return likeliest(logits)
    chances = None
    if any(row.random is not None for row in rows):
        chances = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=logits.device)
    return _draw_rows(logits, rows[0].sampling, chances)


def _draw_rows(logits: torch.Tensor, sampling: Sampling, chances: torch.Tensor | None = None) -> torch.Tensor:
    """One token for each row of adjusted logits (B, V), (B,); `chances` (B,) are random numbers in [0, 1)."""
    if sampling.is_greedy:
        return likeliest(logits)
    probs, tokens = _candidates(logits, sampling)
    drawn = pick(probs, chances)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row of logits (B, V), the first of equally likely ones: (B,) int64."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    # by numpy, since torch's own takes up to ten times as long
    logits = logits.detach()
    if logits.dtype == torch.bfloat16:  # positive ones are ordered as their bits are
        bits = logits.view(torch.int16).numpy()
        if bits.max(axis=-1).min() > 0:
            return torch.from_numpy(bits.argmax(axis=-1))
    return torch.from_numpy(logits.float().numpy().argmax(axis=-1))


def pick(probs: torch.Tensor, chances: torch.Tensor | None = None) -> torch.Tensor:
    """One index for each row of weights (B, K) >= 0, which need not add up to 1: (B,) int64.

    `chances` (B,) are random numbers in [0, 1) (None: from torch's generator); equal ones give equal tokens.
    """
    if chances is None:
        chances = torch.rand(len(probs), device=probs.device)
    sums = probs.double().cumsum(dim=-1)
    return torch.searchsorted(sums, chances.double()[:, None] * sums[:, -1:], right=True)[:, 0]


def _candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities (B, K) of the tokens (B, K) that may be drawn (None: of all, in order)."""
    logits, tokens = logits.float(), None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, tokens = torch.topk(logits, sampling.top_k)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = sample_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        least = logits.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits.softmax(dim=-1), tokens


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution (B, V) float32 that tokens are drawn from; for greedy sampling all is on the likeliest token.

    `logits` (B, V) are those that `Sampling.adjust` gives.
    """
    if sampling.is_greedy:
        return torch.zeros(logits.shape, device=logits.device).scatter_(-1, likeliest(logits)[:, None], 1.0)
    probs, tokens = _candidates(logits, sampling)
    return probs if tokens is None else torch.zeros(logits.shape, device=logits.device).scatter_(-1, tokens, probs)


def multinomial_num_samples_1(probs: torch.Tensor) -> torch.Tensor:
    """One index for each row of probabilities (..., V), as (..., 1)."""
    return pick(probs.reshape(-1, probs.shape[-1])).view(*probs.shape[:-1], 1)


def sample_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (..., V) with all set to -inf but the likeliest tokens whose probabilities first add up to `top_p`
    (nucleus sampling, arXiv:1904.09751). The likeliest one always stays."""
    ordered, order = torch.sort(logits, descending=True)
    probs = ordered.softmax(dim=-1)
    outside = probs.cumsum(dim=-1) - probs >= top_p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), float("-inf"))


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    apply_softmax: bool = True,
) -> torch.Tensor:
    """One token from the logits of the last position of the first row, (V,), (T, V) or (B, T, V): (1,) int64.

    `batched_sample` draws one for every row.

    Args:
        logits: of any dtype.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        apply_softmax: False: `logits` are probabilities.

    Raises:
        ValueError: for a negative temperature, top_k < 1, or top_p outside 0..1.
    """
    row = logits.reshape(-1, *logits.shape[-2:])[0, -1] if logits.ndim > 1 else logits
    return _draw_rows((row if apply_softmax else row.float().log())[None], Sampling(temperature, top_k, top_p))


def batched_sample(
    logits: torch.Tensor | Sequence[torch.Tensor], kwargs: dict[str, Any] | Sequence[dict[str, Any]]
) -> torch.Tensor:
    """One token for each of B logits, with `sample` arguments for all or for each: (B, 1) int64."""
    kwargs = [kwargs] * len(logits) if isinstance(kwargs, dict) else kwargs
    if len(logits) != len(kwargs):
        raise ValueError(f"{len(logits)} logits but {len(kwargs)} sets of sampling arguments")
    return torch.stack([sample(row, **args) for row, args in zip(logits, kwargs, strict=True)])


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> None:
    """Raise `ValueError` for values that sampling cannot mean anything by."""
    Sampling(temperature, top_k, top_p)
