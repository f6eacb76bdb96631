"""One sequence that is generated: its prompt, its sampling, and its tokens so far."""

import copy
import math
import random
from collections import abc
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from litgpt.engine.prefixes import KeptPrefix
from litgpt.engine.sampling import Sampling, check_finite, whole_number
from litgpt.engine.stopping import StopMatcher


@dataclass(eq=False)
class Sequence:
    """One sequence that is generated, from its prompt to its last token.

    Args:
        prompt: tokens (T,), at least one. Sequences with the same tensor share its prefill.
        max_new_tokens: most tokens to draw.
        sampling: how tokens are drawn.
        stop_tokens: sequences of tokens, each of which ends the output.
        include_eos: whether the stop sequence is part of the output.
        logprobs: None, or the number of likeliest tokens to report with the log-probability of each drawn one. These are the
            model's own, before penalties, temperature and so on.
        logprobs_of_prompt: whether those of the prompt's tokens, but the first, are reported too. Its prefill is then not shortened
            by kept prefixes.
        checkpoints: numbers of first tokens of the prompt, such as those of the system prompt, at which an engine with a
            `PrefixStore` keeps the state of caches that cannot be rewound to them later.
        wants_state: whether the engine sets `state`.

    Attributes:
        tokens: the prompt and all tokens drawn so far.
        prompt_length: number of tokens of the prompt.
        n_prefilled: number of tokens of the prompt that are cached.
        n_reused: number of those that a kept prefix had.
        state: of the row when the prompt was cached, if requested.
        is_kept: whether the engine has kept the state of the row.
        n_output: number of drawn tokens that are known to be output.
        finish_reason: "stop" (a stop sequence), "length" (`max_new_tokens`), "cancelled", or None: not finished.
        token_logprobs: log-probabilities of the drawn tokens, if requested.
        top_logprobs: {token: log-probability} of the likeliest tokens at each place, if requested.
        prompt_logprobs, prompt_top_logprobs: the same for the prompt.

    Raises:
        ValueError: for an empty prompt, or numbers out of range.
    """

    prompt: torch.Tensor
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: abc.Sequence[abc.Sequence[int]] = ()
    include_eos: bool = False
    logprobs: int | None = None
    logprobs_of_prompt: bool = False
    checkpoints: tuple[int, ...] = ()
    wants_state: bool = False
    tokens: list[int] = field(init=False)
    prompt_length: int = field(init=False)
    n_prefilled: int = field(default=0, init=False)
    n_reused: int = field(default=0, init=False)
    state: KeptPrefix | None = field(default=None, init=False, repr=False)
    is_kept: bool = field(default=False, init=False)
    n_output: int = field(default=0, init=False)
    finish_reason: Literal["stop", "length", "cancelled"] | None = field(default=None, init=False)
    token_logprobs: list[float] = field(default_factory=list, init=False)
    top_logprobs: list[dict[int, float]] = field(default_factory=list, init=False)
    prompt_logprobs: list[float] = field(default_factory=list, init=False)
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.prompt.ndim != 1 or not len(self.prompt):
            raise ValueError(f"every prompt needs at least one token, (T,), got {tuple(self.prompt.shape)}")
        self.max_new_tokens = whole_number("max_new_tokens", self.max_new_tokens, 1)
        if self.logprobs is not None:
            self.logprobs = whole_number("logprobs", self.logprobs, 0, "None: none")
        elif self.logprobs_of_prompt:
            raise ValueError("logprobs_of_prompt needs logprobs, the number of likeliest tokens to report")
        self.tokens = self.prompt.tolist()
        self.prompt_length = len(self.tokens)
        self._stops = StopMatcher(self.stop_tokens, self.include_eos)
        self._random = None if self.sampling.seed is None else random.Random(self.sampling.seed)
        if self.sampling.processors:
            self.sampling = replace(self.sampling, processors=tuple(map(copy.copy, self.sampling.processors)))

    @property
    def new_tokens(self) -> list[int]:
        """The tokens drawn so far."""
        return self.tokens[self.prompt_length :]

    @property
    def output(self) -> list[int]:
        """The drawn tokens that are known to be output."""
        return self.tokens[self.prompt_length : self.prompt_length + self.n_output]

    @property
    def n_new(self) -> int:
        """Number of tokens drawn so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def n_left(self) -> int:
        """Number of tokens that may still be drawn."""
        return self.max_new_tokens - self.n_new

    @property
    def max_length(self) -> int:
        """Most tokens of the sequence, prompt included."""
        return self.prompt_length + self.max_new_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt is cached and the first token is drawn."""
        return len(self.tokens) > self.prompt_length

    @property
    def has_seed(self) -> bool:
        """Whether the sequence has its own generator."""
        return self._random is not None

    def uniform(self) -> float:
        """The next random number, in [0, 1)."""
        # 32 bits: as a float64 it stays below 1 when it is multiplied with a sum near 1
        return (
            torch.rand((), dtype=torch.float32).item() if self._random is None else self._random.getrandbits(32) / 2**32
        )

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (V,) of the next token after penalties, bias and processors, float32."""
        return self.sampling.adjust(logits, self.tokens, self.prompt_length)

    def append(self, token: int, logits: torch.Tensor | None) -> list[int]:
        """Append a token, which may finish the sequence, drawn from the model's `logits` (V,), which log-probabilities need.
        Returns the tokens that are now known to be output."""
        if self.logprobs is not None:
            drawn, top = self._logprobs(logits[None], [token])
            self.token_logprobs += drawn
            self.top_logprobs += top
        self.tokens.append(token)
        output = self._stops.push(token)
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif not self.n_left:
            output += self._stops.flush()
            self.finish_reason = "length"
        self.n_output += len(output)
        return output

    def note_prompt(self, logits: torch.Tensor) -> None:
        """Note the log-probabilities of the next tokens of the prompt, from the model's logits (n, V)."""
        n = 1 + len(self.prompt_logprobs)
        found, top = self._logprobs(logits, self.tokens[n : n + len(logits)])
        self.prompt_logprobs += found
        self.prompt_top_logprobs += top

    def _logprobs(self, logits: torch.Tensor, tokens: abc.Sequence[int]) -> tuple[list[float], list[dict[int, float]]]:
        """The log-probabilities of tokens, and of the likeliest ones in their places, from logits (n, V)."""
        logprobs = logits.float().log_softmax(dim=-1)
        values, likeliest = logprobs.topk(self.logprobs)
        found = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        check_finite(not any(map(math.isnan, found)))  # a logits processor may have put something else in place of NaN
        return found, [dict(zip(*pair, strict=True)) for pair in zip(likeliest.tolist(), values.tolist(), strict=True)]
