"""A conversation with a model: what was said, and the tokens that it became."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.engine.drafting import Drafter
from litgpt.engine.loading import Ready
from litgpt.engine.session import Session
from litgpt.engine.session_file import SessionFile
from litgpt.prompts import encode_prompt


@dataclass
class Conversation:
    """Turns of a user and a model. Only what is new in a turn goes through the model.

    When the context is full the oldest turns are dropped, unless the caches evict, and `notify` is told.

    Attributes:
        ready: the model and what belongs to it.
        session: tokens and caches, of that model.
        max_new_tokens: most tokens of an answer.
        sampling: arguments of `sample`.
        sys_prompt: system prompt (None: what the chat template has).
        notify: is told, in one line, what the user should know.
        drafter: drafts the next tokens of answers (None: no drafts).
    """

    ready: Ready
    session: Session
    max_new_tokens: int
    sampling: dict[str, Any]
    sys_prompt: str | None = None
    notify: Callable[[str], None] = print
    drafter: Drafter | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()
        self.session.reset()
        self._text, self._tokens = "", []  # of the conversation so far, the last answer included
        self.prompt_tokens = self.answer_tokens = 0  # of the last turn

    def save(self, path: Path) -> None:
        """Write the conversation and the caches to a file."""
        known = self.session.tokens[: len(self._tokens)] == self._tokens  # not so after an error
        self.session.notes = {
            "messages": self.messages,
            "sys_prompt": self.sys_prompt,
            "text": self._text if known else "",
            "tokens": len(self._tokens) if known else 0,
        }
        self.session.save(path)

    def resume(self, file: SessionFile) -> None:
        """Go on where a saved conversation ended; a system prompt that is set replaces its own.

        Raises:
            ValueError: if the file holds no conversation, or does not fit the session.
        """
        notes = file.about["notes"]
        if "messages" not in notes:
            raise ValueError(f"{file.path} holds a session, but no conversation: name another file to begin one")
        self.session.restore(file)
        self.messages = notes["messages"]
        self.sys_prompt = notes["sys_prompt"] if self.sys_prompt is None else self.sys_prompt
        self._text, self._tokens = notes["text"], self.session.tokens[: notes["tokens"]]

    def ask(self, text: str) -> Iterator[str]:
        """Say something, and get the answer piece by piece. An answer left early stays in the conversation as it is.

        Raises:
            ValueError: if the message does not fit into the context even alone; it then is as if it was not said.
        """
        self.messages, prompt_text, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        self.prompt_tokens, answer, said = len(prompt), [], ""

        def tokens() -> Iterator[int]:
            for token in self.session.generate(
                prompt,
                self.max_new_tokens,
                stop_tokens=self.ready.stop_tokens,
                drafter=self.drafter,
                **self.sampling,
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
        limit, dropped = self.session.limit, 0
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
        if any(cache.policy.sinks for cache in self.session.kv_caches):
            return "Without --sinks the conversation could go on without a limit."
        return "With --kv_cache lastrec the conversation can go on without a limit."
