"""One sequence to be generated, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from litgpt.engine.sampling import Sampling


@dataclass(eq=False)
class Request:
    """One sequence to be generated, and what came of it.

    Args:
        prompt: tokens (T,), at least one. Requests that share one tensor share its prefill.
        max_new_tokens: most tokens to draw.
        sampling: how they are drawn.
        stop_tokens: sequences of tokens, each of which ends the output.
        include_eos: whether such a sequence is part of the output.
        logprobs: None, or how many of the likeliest tokens are told with each drawn one's log-probability. These are the
            model's own (of its logits before penalties, temperature and so on).

    Attributes:
        tokens: those drawn so far.
        released: how many of them are known to be output.
        finish_reason: "stop" (a stop sequence came), "length" (`max_new_tokens` did), "cancelled", or None: not finished.
        token_logprobs: natural logarithms of the drawn tokens' probabilities, if asked for.
        top_logprobs: {token: log-probability} of the likeliest tokens in place of each drawn one, if asked for.

    Raises:
        ValueError: for an empty prompt, or numbers that mean nothing.
    """

    prompt: torch.Tensor
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: Sequence[Sequence[int]] = ()
    include_eos: bool = False
    logprobs: int | None = None
    tokens: list[int] = field(default_factory=list, init=False)
    released: int = field(default=0, init=False)
    finish_reason: Literal["stop", "length", "cancelled"] | None = field(default=None, init=False)
    token_logprobs: list[float] = field(default_factory=list, init=False)
    top_logprobs: list[dict[int, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.prompt.ndim != 1 or not len(self.prompt):
            raise ValueError(f"every prompt needs at least one token, (T,), got {tuple(self.prompt.shape)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be at least 0 (None: none), got {self.logprobs}")

    @property
    def output(self) -> list[int]:
        """The tokens known to be output so far."""
        return self.tokens[: self.released]

    @property
    def length(self) -> int:
        """Most tokens that the sequence will have."""
        return len(self.prompt) + self.max_new_tokens
