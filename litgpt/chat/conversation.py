"""A conversation with a model: what was said, and the tokens that it became."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from litgpt.generate.session import Session
from litgpt.generate.setup import Ready
from litgpt.prompts import encode_prompt


@dataclass
class Conversation:
    """Turns of a user and a model. Only what is new in a turn goes through the model.

    When the context is full the oldest turns are dropped, unless the caches evict, and `notify` is told.

    Attributes:
        ready: the model and what belongs to it.
        max_new_tokens: most tokens of an answer.
        sampling: arguments of `sample`.
        sys_prompt: system prompt (None: what the chat template has).
        prompt_chunksize: most tokens that go through the model at once in a prefill.
        notify: is told, in one line, what the user should know.
    """

    ready: Ready
    max_new_tokens: int
    sampling: dict[str, Any]
    sys_prompt: str | None = None
    prompt_chunksize: int | None = None
    notify: Callable[[str], None] = print
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = Session(self.ready.model, self.prompt_chunksize)
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()
        self.session.reset()
        self._text, self._tokens = "", []  # of the conversation so far, the last answer included
        self.prompt_tokens = self.answer_tokens = 0  # of the last turn

    def ask(self, text: str) -> Iterator[str]:
        """Say something, and get the answer piece by piece. An answer left early stays in the conversation as it is.

        Raises:
            ValueError: if the message does not fit into the context even alone; it then is as if it was not said.
        """
        self.messages, prompt_text, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        self.prompt_tokens, answer, said = len(prompt), [], ""

        def tokens() -> Iterator[int]:
            for token in self.session.generate(
                prompt, self.max_new_tokens, stop_tokens=self.ready.stop_tokens, **self.sampling
            ):
                answer.append(token)
                yield token

        try:
            for piece in self.ready.tokenizer.decode_stream(tokens()):
                said += piece
                yield piece
        finally:
            self.answer_tokens = len(answer)
            self.messages.append({"role": "assistant", "content": said})
            self._text, self._tokens = prompt_text + said, prompt + answer

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str, list[int]]:
        """Messages, of which the oldest turns are dropped until an answer finds room; their text and tokens."""
        limit, dropped = self._limit(), 0
        while True:
            text, tokens = self._render(messages)
            if limit is None or len(tokens) + self.max_new_tokens <= limit:
                break
            if len(messages) == 1:
                raise ValueError(
                    f"this message comes to {len(tokens)} tokens; with an answer of up to {self.max_new_tokens} it does "
                    f"not fit into {limit}: shorten it, or lower --max_new_tokens. {self._way_out()}"
                )
            messages = messages[2:]
            dropped += 1
        if dropped:
            self.notify(
                f"The context of {limit} tokens is full: dropped the oldest {dropped} turn{'s' * (dropped > 1)}. "
                + self._way_out()
            )
        return messages, text, tokens

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        style, tokenizer = self.ready.prompt_style, self.ready.tokenizer
        text = style.render(messages, sys_prompt=self.sys_prompt)
        if self._text and text.startswith(self._text):
            # go on from the very tokens that the model said, which the caches hold
            return text, self._tokens + tokenizer.encode(text[len(self._text) :], bos=False).tolist()
        return text, encode_prompt(tokenizer, style, messages, sys_prompt=self.sys_prompt).tolist()

    def _way_out(self) -> str:
        if any(cache.policy.sinks for cache in self.ready.model.kv_caches()):
            return "Without --sinks the conversation could go on without a limit."
        return "With --kv_cache lastrec the conversation can go on without a limit."

    def _limit(self) -> int | None:
        """Tokens that fit into the context or the caches; None: any number."""
        model = self.ready.model
        if model.default_kv_caches or not model.kv_caches():
            return model.max_seq_length
        if all(cache.unbounded for cache in model.kv_caches()):
            return None
        lengths = [cache.cache_length for cache in model.kv_caches() if cache.max_prefill_length is not None]
        return min([model.max_seq_length, *lengths])
