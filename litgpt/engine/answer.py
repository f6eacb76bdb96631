"""Answers: generated sequences as text, with their log-probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litgpt.engine.sequence import Sequence
from litgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability at its place in a text.

    The probability is the model's own, before penalties, temperature and so on (None: there is none, in front of all others).
    `top` are the likeliest tokens there.
    """

    token: str
    id: int
    logprob: float | None
    top: tuple["TokenLogprob", ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, token: int, logprob: float | None, top: Mapping[int, float]) -> "TokenLogprob":
        """An entry, with the likeliest tokens as {token: log-probability}."""
        text = tokenizer.token_bytes(token).decode(errors="replace") or tokenizer.id_to_token(token) or ""
        return cls(text, token, logprob, tuple(cls.of(tokenizer, *pair, {}) for pair in top.items()))


@dataclass(frozen=True)
class Answer:
    """A generated text.

    Attributes:
        text: without the prompt and the stop sequence.
        tokens: of the text.
        finish_reason: "stop" (a stop sequence), "length" (`max_new_tokens`), or "cancelled".
        prompt_tokens: number of tokens of the prompt.
        logprobs: one entry a token, if requested.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None = None

    @classmethod
    def of(cls, sequence: Sequence, tokenizer: Tokenizer) -> "Answer":
        """The answer to a finished sequence."""

        logprobs = None
        if sequence.logprobs is not None:
            drawn = zip(sequence.output, sequence.token_logprobs, sequence.top_logprobs, strict=False)
            logprobs = [TokenLogprob.of(tokenizer, *entry) for entry in drawn]
        text = tokenizer.decode(sequence.output)
        return cls(text, sequence.output, sequence.finish_reason, len(sequence.prompt), logprobs)

    def record(self) -> dict[str, Any]:
        """The answer as a JSON object; its tokens are only counted."""
        record: dict[str, Any] = {
            "answer": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
        }
        if self.logprobs is not None:
            record["logprobs"] = [{**_entry(one), "top": [_entry(other) for other in one.top]} for one in self.logprobs]
        return record


def _entry(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "id": one.id, "logprob": one.logprob}


def counted(number: int, noun: str) -> str:
    """A number of things: "1 answer", "2,000 answers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
