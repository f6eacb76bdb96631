"""From logits to tokens: how they are drawn, and the distributions that they are drawn from."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from litgpt.kernels import ops
from litgpt.settings import shown

LogitsProcessor = Callable[[Sequence[int], torch.Tensor], torch.Tensor]

MAX_BIAS = torch.finfo(torch.float32).max
MIN_TEMPERATURE = 1e-5  # below it sampling is greedy
NO_TOKEN = -1  # if no token can be drawn; `check_tokens` raises once tokens are read from the device

_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {  # settings with their valid values, also in words
    "temperature": (lambda x: x >= 0, "at least 0 (0: greedy)"),
    "top_p": (lambda x: 0 <= x <= 1, "in 0..1 (1: no limit)"),
    "min_p": (lambda x: 0 <= x <= 1, "in 0..1 (0: no limit)"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "positive (1: none)"),
    "presence_penalty": (math.isfinite, "a number (0: none)"),
    "frequency_penalty": (math.isfinite, "a number (0: none)"),
}


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are drawn.

    The order is: penalties, `logit_bias`, `processors`, then top-k, temperature, top-p, min-p, and a draw.

    Args:
        temperature: logits are divided by it; 0 is greedy sampling.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens whose probabilities add up to this (nucleus sampling, arXiv:1904.09751).
        min_p: draw from tokens at least this times as likely as the likeliest one (arXiv:2407.01082).
        repetition_penalty: divides positive logits of tokens in prompt and output, multiplies negative ones
            (arXiv:1909.05858).
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: the same, for every occurrence.
        logit_bias: added to the logits of tokens, {token: bias}.
        seed: of the sequence's own generator, whose draws do not depend on other sequences.
        processors: called as `(tokens so far, logits (V,) float32)`, prompt included; return logits (V,). Every sequence gets
            copies (`copy.copy`), so they may keep state.

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
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, (is_valid, requirement) in _NUMBERS.items():
            value = _number(name, getattr(self, name))
            if not is_valid(value):
                raise ValueError(f"{name} must be {requirement}, got {value}")
            keep(name, value)
        if self.top_k is not None:
            keep("top_k", whole_number("top_k", self.top_k, 1, "None: no limit"))
        if self.seed is not None:
            keep("seed", whole_number("seed", self.seed, None, "None: torch's generator"))
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(f"logit_bias must be a mapping {{token: number}}, got {self.logit_bias!r}")
        for token, bias in (self.logit_bias or {}).items():
            is_token = isinstance(token, Integral) and not isinstance(token, bool) and token >= 0
            if not (is_token and isinstance(bias, Real) and (-MAX_BIAS <= bias <= MAX_BIAS or bias == -math.inf)):
                raise ValueError(f"logit_bias takes tokens (0, 1, ...) and numbers, got {token!r}: {shown(bias)}")
        if not isinstance(self.processors, Iterable):
            raise ValueError(f"logits processors must be a list of functions, got {self.processors!r}")
        keep("processors", tuple(self.processors))
        for process in self.processors:
            if not callable(process):
                raise ValueError(f"a logits processor is called with (tokens, logits), got {process!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always drawn."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by penalties, bias or processors."""
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
            logits[index(list(self.logit_bias))] += torch.tensor(
                [float(bias) for bias in self.logit_bias.values()], device=logits.device
            )
        for process in self.processors:
            changed = process(tokens, logits)
            if not (isinstance(changed, torch.Tensor) and changed.shape == logits.shape):
                got = tuple(changed.shape) if isinstance(changed, torch.Tensor) else shown(changed)
                raise ValueError(f"a logits processor must return logits {tuple(logits.shape)}, {process!r} gave {got}")
            logits = changed.float()
        return logits


def draw_rows(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor | None = None) -> torch.Tensor:
    """Draw a token for each row of adjusted logits (B, V): (B,) int64, `NO_TOKEN` where they are not finite.

    `uniforms` (B,) are random numbers in [0, 1) (None: from torch's generator).
    """
    if sampling.is_greedy:
        return likeliest(logits)
    probs, tokens = _candidates(logits, sampling)
    picked = pick(probs, uniforms)
    if tokens is None:
        return picked
    return torch.where(picked < 0, picked, tokens.gather(-1, picked.clamp(min=0)[:, None])[:, 0])


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row of logits (B, V), the first of equally likely ones: (B,) int64.

    `NO_TOKEN` where logits are NaN or inf, or all are -inf.
    """
    if logits.device.type != "cpu":
        values, tokens = logits.max(dim=-1)
        return torch.where(values.isfinite(), tokens, NO_TOKEN)
    # by a kernel where there is one: a step has read all weights, so code comes from memory, and numpy has three times as much
    if ops.can_find_likeliest(logits):
        return ops.likeliest(logits)
    values = logits.detach().float().numpy()
    tokens = values.argmax(axis=-1)  # a NaN, if there is one
    best = np.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]
    return torch.from_numpy(np.where(np.isfinite(best), tokens, NO_TOKEN))


def pick(probs: torch.Tensor, uniforms: torch.Tensor | None = None) -> torch.Tensor:
    """Draw an index for each row of weights (B, K) >= 0, which need not be normalised: (B,) int64, `NO_TOKEN` where the sum is 0
    or NaN.

    `uniforms` (B,) are random numbers in [0, 1) (None: from torch's generator); equal ones give equal tokens.
    """
    if uniforms is None:
        uniforms = torch.rand(len(probs), dtype=torch.float32, device=probs.device)
    sums = probs.double().cumsum(dim=-1)
    total = sums[:, -1:]
    picked = torch.searchsorted(sums, uniforms.double()[:, None] * total, right=True)
    return torch.where(total > 0, picked, NO_TOKEN)[:, 0]


def check_tokens(tokens: list[int]) -> list[int]:
    """Return drawn tokens; `ValueError` if there is a `NO_TOKEN` among them."""
    check_finite(min(tokens, default=0) >= 0)
    return tokens


def check_finite(finite: bool) -> None:
    """Raise `ValueError` for logits that no token can be drawn from."""
    if not finite:
        raise ValueError(
            "no token can be drawn: the model's logits are NaN or infinite, or -inf for every token. Its weights or its "
            "configuration are broken, the precision is too low for it, or logit_bias or a logits processor bans all tokens"
        )


def whole_number(name: str, value: object, least: int | None = None, hint: str = "") -> int:
    """`value` as an int, also where it is a float such as 50.0; `ValueError` for others, and for less than `least`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or value != value or value in (math.inf, -math.inf) or int(value) != value:
        raise ValueError(f"{name} must be a whole number{hint and f' ({hint})'}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}{hint and f' ({hint})'}, got {value}")
    return int(value)


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large") from None


def _candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities (B, K) of the candidates (B, K) (None: all tokens in order); NaN where logits are not finite."""
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
    """The distribution (B, V) float32 that tokens are drawn from, given adjusted logits (B, V); one-hot for greedy sampling, NaN
    where logits are not finite."""
    if sampling.is_greedy:
        tokens = likeliest(logits)[:, None]
        certain = torch.where(tokens < 0, torch.nan, 1.0).float()
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, tokens.clamp(min=0), certain)
    probs, tokens = _candidates(logits, sampling)
    return probs if tokens is None else torch.zeros_like(logits, dtype=probs.dtype).scatter_(-1, tokens, probs)


def multinomial_num_samples_1(probs: torch.Tensor) -> torch.Tensor:
    """One index for each row of probabilities (..., V), as (..., 1)."""
    return _checked(pick(probs.reshape(-1, probs.shape[-1]))).view(*probs.shape[:-1], 1)


def _checked(tokens: torch.Tensor) -> torch.Tensor:
    """`check_tokens` for a tensor; waits for the device."""
    if not torch.compiler.is_compiling():
        check_finite(not (tokens < 0).any())
    return tokens


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
    """Draw a token from the logits of the last position of the first row, (V,), (T, V) or (B, T, V): (1,) int64.

    `batched_sample` draws for every row. With `apply_softmax=False`, `logits` are probabilities. The other arguments are those
    of `Sampling`.

    Raises:
        ValueError: for a negative temperature, top_k < 1, top_p outside 0..1, or logits that are not finite.
    """
    row = logits.reshape(-1, *logits.shape[-2:])[0, -1] if logits.ndim > 1 else logits
    row = row if apply_softmax else row.float().log()
    return _checked(draw_rows(row[None], Sampling(temperature, top_k, top_p)))


def batched_sample(
    logits: torch.Tensor | Sequence[torch.Tensor], kwargs: dict[str, Any] | Sequence[dict[str, Any]]
) -> torch.Tensor:
    """`sample` for each of B logits, with arguments for all or for each: (B, 1) int64."""
    kwargs = [kwargs] * len(logits) if isinstance(kwargs, dict) else kwargs
    if len(logits) != len(kwargs):
        raise ValueError(f"{len(logits)} logits but {len(kwargs)} sets of sampling arguments")
    return torch.stack([sample(row, **args) for row, args in zip(logits, kwargs, strict=True)])
