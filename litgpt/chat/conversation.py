"""A conversation with a model: what was said, and the tokens that it became."""

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

PREFILL_CHUNK = 512  # tokens: a prompt is cut where that changes nothing, so that it can be told how far it is


@dataclass(frozen=True)
class _Said:
    """What was said so far: replaced as a whole or not at all, wherever an interrupt comes.

    Attributes:
        messages: all of them, the oldest first.
        dropped: first messages that the context had no room for.
        text, tokens: of the conversation, the last answer included, without what was dropped.
    """

    messages: tuple[dict[str, str], ...] = ()
    dropped: int = 0
    text: str = ""
    tokens: tuple[int, ...] = ()


@dataclass
class Conversation:
    """Turns of a user and a model. Only what is new in a turn goes through the model.

    When the context is full the oldest turns are left out of what the model reads, unless the caches evict, and `notify` is
    told.

    Attributes:
        ready: the model and what belongs to it.
        new_session: makes empty caches for that model.
        max_new_tokens: most tokens of an answer.
        sampling: arguments of `sample`.
        sys_prompt: system prompt (None: what the chat template has).
        notify: is told, in one line, what the user should know.
        drafter: drafts the next tokens of answers (None: no drafts).
        session: tokens and caches.
        prompt_tokens, answer_tokens: of the last turn.
        answer_limit: most tokens that the last answer could have had.
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
        self._said = _Said()

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that was said, the oldest first."""
        return list(self._said.messages)

    def reset(self) -> None:
        """Forget what was said."""
        self._said = _Said()
        self.session.reset()

    def renew_caches(self) -> None:
        """Begin with empty caches again, after an interrupt has left them in whatever state; what was said stays, and is
        computed again for the next answer."""
        self.ready.model.clear_kv_caches(assigned=True)
        self.session = self.new_session()

    def save(self, path: Path) -> None:
        """Write the conversation and the caches to a file."""
        said = self._said
        known = tuple(self.session.tokens[: len(said.tokens)]) == said.tokens  # not so after an error
        self.session.notes = {
            "messages": self.messages,
            "dropped": said.dropped,
            "sys_prompt": self.sys_prompt,
            "text": said.text if known else "",
            "tokens": len(said.tokens) if known else 0,
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
        self.sys_prompt = notes["sys_prompt"] if self.sys_prompt is None else self.sys_prompt
        tokens = tuple(self.session.tokens[: notes["tokens"]])
        self._said = _Said(tuple(notes["messages"]), notes.get("dropped", 0), notes["text"], tokens)

    def ask(self, text: str) -> Iterator[str]:
        """Say something, and get the answer piece by piece. An answer left early stays in the conversation as it is; where
        there is none yet, and after an error before the first token, the message is as if it was not said.

        Raises:
            ValueError: if the message does not fit into the context even alone.
        """
        messages = (*self._said.messages, {"role": "user", "content": text})
        dropped, prompt_text, prompt = self._fit(messages)
        self.prompt_tokens, self.answer_tokens = len(prompt), 0
        limit = self.session.limit
        self.answer_limit = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(prompt))
        cut = all(cache.is_chunk_invariant(len(prompt)) for cache in self.session.kv_caches)
        self.session.prompt_chunksize = self._chunksize or (PREFILL_CHUNK if cut else None)
        answer, said, whole = [], "", False

        def tokens() -> Iterator[int]:
            for token in self.session.generate(
                prompt, self.answer_limit, stop_tokens=self.ready.stop_tokens, drafter=self.drafter, **self.sampling
            ):
                answer.append(token)
                yield token

        try:
            for piece in self.ready.tokenizer.decode_stream(tokens()):
                said += piece
                yield piece
            whole = True
        finally:
            self.answer_tokens = len(answer)
            if answer or whole:
                messages = (*messages, {"role": "assistant", "content": said})
                self._said = _Said(messages, dropped, prompt_text + said, (*prompt, *answer))

    def _fit(self, messages: tuple[dict[str, str], ...]) -> tuple[int, str, list[int]]:
        """How many of the oldest messages have to be left out so that an answer finds room; text and tokens of the rest."""
        limit, before = self.session.limit, self._said.dropped
        dropped = before
        while True:
            text, tokens = self._render(list(messages[dropped:]))
            if limit is None or len(tokens) + min(self.max_new_tokens, limit // 2) <= limit:
                break
            if dropped >= len(messages) - 1:
                raise ValueError(
                    f"this message comes to {counted(len(tokens), 'token')}; with an answer of up to {self.max_new_tokens} it does "
                    f"not fit into {limit}: shorten it, or lower --max_new_tokens. {self._way_out()}"
                )
            dropped += 2
        if turns := (dropped - before) // 2:
            self.notify(
                f"The context of {limit} tokens is full: dropped the oldest {counted(turns, 'turn')}. "
                + self._way_out()
            )
        return dropped, text, tokens

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        style, tokenizer, said = self.ready.prompt_style, self.ready.tokenizer, self._said
        text = style.render(messages, sys_prompt=self.sys_prompt)
        if said.text and text.startswith(said.text):
            # go on from the very tokens that the model said, which the caches hold
            return text, [*said.tokens, *tokenizer.encode(text[len(said.text) :], bos=False).tolist()]
        return text, encode_prompt(tokenizer, style, messages, sys_prompt=self.sys_prompt).tolist()

    def _way_out(self) -> str:
        if self.session.n_sink:
            return "Without --kv_cache_args.n_sink the conversation could go on without a limit."
        return "With --kv_cache lastrec the conversation can go on without a limit."
