"""A conversation with a model: its messages and their tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.engine.answer import counted
from litgpt.engine.drafting import Drafter
from litgpt.engine.loading import Ready
from litgpt.engine.session import Session
from litgpt.engine.session_file import SessionFile
from litgpt.prompts import encode_prompt

PREFILL_CHUNK = 512  # tokens of a prefill call, for a progress display; only if chunks do not change the output
WAY_OUT = "With --kv_cache lastrec and no --kv_cache_args.n_sink the conversation can go on without a limit."


@dataclass(frozen=True)
class _Messages:
    """The messages so far, replaced in one assignment, so that interrupts cannot leave them inconsistent.

    Attributes:
        messages: all, the oldest first.
        dropped: number of first messages that the context has no room for.
        text, tokens: of the conversation without dropped messages, the last answer included.
    """

    messages: tuple[dict[str, str], ...] = ()
    dropped: int = 0
    text: str = ""
    tokens: tuple[int, ...] = ()


@dataclass
class Conversation:
    """Turns of a user and a model. Only the new tokens of a turn are computed.

    If the context is full and the caches do not evict, the oldest turns are dropped from the prompt, and `notify` is called.

    Attributes:
        ready: the model.
        new_session: makes empty caches for it.
        max_new_tokens: most tokens of an answer.
        sampling: fields of `Sampling`.
        sys_prompt: system prompt (None: the chat template's).
        notify: gets messages for the user, one line each.
        drafter: drafts the next tokens of answers (None: no drafts).
        session: tokens and caches.
        prompt_tokens, answer_tokens: numbers of tokens of the last turn.
        answer_limit: most tokens that the last answer could have.
    """

    ready: Ready
    new_session: Callable[[], Session]
    max_new_tokens: int
    sampling: dict[str, Any]
    sys_prompt: str | None = None
    notify: Callable[[str], None] = print
    drafter: Drafter | None = None
    prompt_tokens: int = field(default=0, init=False)
    answer_tokens: int = field(default=0, init=False)
    answer_limit: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.session = self.new_session()
        self._chunksize = self.session.prompt_chunksize
        self._history = _Messages()

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the oldest first."""
        return list(self._history.messages)

    def reset(self) -> None:
        """Forget all messages."""
        self._history = _Messages()
        self.session.reset()

    def renew_caches(self) -> None:
        """Replace the caches by empty ones after an interrupt; the messages are computed again for the next answer."""
        self.ready.model.clear_kv_caches(assigned=True)
        self.session = self.new_session()

    def save(self, path: Path) -> None:
        """Write the conversation and the caches to a file."""
        history = self._history
        known = tuple(self.session.tokens[: len(history.tokens)]) == history.tokens  # not after an error
        self.session.notes = {
            "messages": self.messages,
            "dropped": history.dropped,
            "sys_prompt": self.sys_prompt,
            "text": history.text if known else "",
            "tokens": len(history.tokens) if known else 0,
        }
        self.session.save(path)

    def resume(self, file: SessionFile) -> None:
        """Resume a saved conversation; a system prompt, if set, replaces the saved one.

        Raises:
            ValueError: if the file holds no conversation, or does not fit the session.
        """
        notes = file.about["notes"]
        if "messages" not in notes:
            raise ValueError(f"{file.path} holds a session, but no conversation: name another file to begin one")
        self.session.restore(file)
        self.sys_prompt = notes["sys_prompt"] if self.sys_prompt is None else self.sys_prompt
        tokens = tuple(self.session.tokens[: notes["tokens"]])
        self._history = _Messages(tuple(notes["messages"]), notes.get("dropped", 0), notes["text"], tokens)

    def ask(self, text: str) -> Iterator[str]:
        """Send a message; yields the answer in parts. If the iterator is left early, the answer so far stays in the
        conversation; without any answer, and after an error before the first token, the message is dropped.

        Raises:
            ValueError: if the message alone does not fit into the context.
        """
        messages = (*self._history.messages, {"role": "user", "content": text})
        dropped, prompt_text, prompt = self._fit(messages)
        self.prompt_tokens, self.answer_tokens = len(prompt), 0
        limit = self.session.limit
        self.answer_limit = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(prompt))
        cut = all(cache.is_chunk_invariant(len(prompt)) for cache in self.session.kv_caches)
        self.session.prompt_chunksize = self._chunksize or (PREFILL_CHUNK if cut else None)
        answer, answer_text, whole = [], "", False

        def tokens() -> Iterator[int]:
            for token in self.session.generate(
                prompt, self.answer_limit, stop_tokens=self.ready.stop_tokens, drafter=self.drafter, **self.sampling
            ):
                answer.append(token)
                yield token

        try:
            for part in self.ready.tokenizer.decode_stream(tokens()):
                answer_text += part
                yield part
            whole = True
        finally:
            self.answer_tokens = len(answer)
            if answer or whole:
                messages = (*messages, {"role": "assistant", "content": answer_text})
                self._history = _Messages(messages, dropped, prompt_text + answer_text, (*prompt, *answer))

    def _fit(self, messages: tuple[dict[str, str], ...]) -> tuple[int, str, list[int]]:
        """Number of oldest messages to drop to make room for an answer, and text and tokens of the rest."""
        limit, before = self.session.limit, self._history.dropped
        dropped = before
        while True:
            text, tokens = self._render(list(messages[dropped:]))
            if limit is None or len(tokens) + min(self.max_new_tokens, limit // 2) <= limit:
                break
            if dropped >= len(messages) - 1:
                raise ValueError(
                    f"this message comes to {counted(len(tokens), 'token')}; with an answer of up to {self.max_new_tokens} "
                    f"it does not fit into {limit}: shorten it, or lower --max_new_tokens. {WAY_OUT}"
                )
            dropped += 2
        if turns := (dropped - before) // 2:
            self.notify(
                f"The context of {limit} tokens is full: dropped the oldest {counted(turns, 'turn')}. " + WAY_OUT
            )
        return dropped, text, tokens

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        style, tokenizer, history = self.ready.prompt_style, self.ready.tokenizer, self._history
        text = style.render(messages, sys_prompt=self.sys_prompt)
        if history.text and text.startswith(history.text):
            # keep the tokens that the model drew: they are cached
            return text, [*history.tokens, *tokenizer.encode(text[len(history.text) :], bos=False).tolist()]
        return text, encode_prompt(tokenizer, style, messages, sys_prompt=self.sys_prompt).tolist()
