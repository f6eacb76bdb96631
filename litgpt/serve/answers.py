"""Answers of the endpoints: generations as JSON objects, whole or chunk by chunk."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from litgpt.engine.answer import Answer, TokenLogprob
from litgpt.engine.service import Generation
from litgpt.serve.errors import ApiError
from litgpt.serve.served import ServedModel
from litgpt.serve.tools import Tools


class Answers:
    """The answers to one request, as they are generated.

    Args:
        served: the model.
        generations: of the request, in the order of their indexes; for several prompts, prompt by prompt.
        kind: "chat.completion" or "text_completion".
        timeout: seconds that they may wait for their turn.
        echo: texts to put in front of each, if asked for.
        tools: that may be called.

    Attributes:
        messages: of a chat, once they are complete.
        at_end: awaited when all answers are complete, before the client learns it.
    """

    def __init__(
        self,
        served: ServedModel,
        generations: list[Generation],
        kind: str,
        timeout: float,
        echo: list[str] | None = None,
        tools: Tools | None = None,
    ) -> None:
        self.served, self.generations, self.kind, self.tools = served, generations, kind, tools
        self.timeout = timeout
        self.messages: list[dict[str, Any]] = [{}] * len(generations)
        self.at_end: Callable[[], Awaitable[None]] = _nothing
        self.echo = echo or [""] * len(generations)
        # index (None: the time to wait is over), text, whether it was the last
        self.events: asyncio.Queue[tuple[int | None, str, bool]] = asyncio.Queue()
        prefix = "chatcmpl-" if kind.startswith("chat") else "cmpl-"
        self.common = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": served.name}
        loop = asyncio.get_running_loop()
        for index, generation in enumerate(generations):

            def deliver(one: Generation, text: str, index: int = index) -> None:
                last = one.finish_reason is not None
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, text, last))

            generation.deliver = deliver

    async def pieces(self) -> AsyncIterator[tuple[int, str, bool]]:
        """(index, text, whether this answer is complete) until all are.

        Raises:
            ApiError: if one fails.
        """
        left, over = len(self.generations), (None, "", False)
        timer = asyncio.get_running_loop().call_later(self.timeout, self.events.put_nowait, over)
        try:
            while left:
                index, text, last = await self.events.get()
                if index is None:
                    if not any(one.has_begun for one in self.generations):
                        raise ApiError(
                            504,
                            f"no place was free within {self.timeout} seconds",
                            None,
                            "timeout",
                            {"retry-after": "1"},
                        )
                    continue
                if last:
                    left -= 1
                    generation = self.generations[index]
                    if generation.finish_reason in ("error", "cancelled"):
                        raise _failure(generation)
                yield index, text, last
        finally:
            timer.cancel()

    async def whole(self) -> dict[str, Any]:
        """The response of a request that does not stream."""
        texts = list(self.echo)
        async for index, text, _ in self.pieces():
            texts[index] += text
        choices = [self._choice(i, text) for i, text in enumerate(texts)]
        await self.at_end()
        return {**self.common, "object": self.kind, "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        generation = self.generations[index]
        choice = {
            "index": index,
            "finish_reason": generation.finish_reason,
            "logprobs": self.logprobs(generation, text),
        }
        if self.kind.startswith("chat"):
            _, calls = self._content(index, text)
            message = {**self.messages[index], "refusal": None}
            return {**choice, "message": message, **({"finish_reason": "tool_calls"} if calls else {})}
        return {**choice, "text": text}

    def _content(self, index: int, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """Text and calls of tools of a complete answer, which becomes a message."""
        content, calls = (text, []) if self.tools is None else self.tools.calls(text)
        self.messages[index] = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
        return content, calls

    def logprobs(self, generation: Generation, text: str) -> dict[str, Any] | None:
        if generation.logprobs is None:
            return None
        sequence, tokenizer = generation.sequence, self.served.ready.tokenizer
        entries = Answer.of(sequence, tokenizer).logprobs or []
        if self.kind.startswith("chat"):
            return {"content": [{**_entry(one), "top_logprobs": [_entry(x) for x in one.top]} for one in entries]}
        if generation.logprobs_of_prompt:
            prompt = zip(
                sequence.tokens, [None, *sequence.prompt_logprobs], [{}, *sequence.prompt_top_logprobs], strict=False
            )
            entries = [TokenLogprob.of(tokenizer, *entry) for entry in prompt] + entries
        offsets, at = [], len(text) - sum(len(one.token) for one in entries)
        for one in entries:
            offsets.append(max(0, at))
            at += len(one.token)
        return {
            "tokens": [one.token for one in entries],
            "token_logprobs": [one.logprob for one in entries],
            "top_logprobs": [None if one.logprob is None else _by_text(one.top) for one in entries],
            "text_offset": offsets,
        }

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens; a prompt counts once, however many answers it has."""
        prompts = {id(one.prompt): one for one in self.generations}.values()
        prompt = sum(len(one.prompt) for one in prompts)
        cached = sum(one.sequence.n_reused for one in prompts if one.sequence is not None)
        completion = sum(one.sequence.n_new for one in self.generations if one.sequence is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def stream(self, include_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events."""
        chat = self.kind.startswith("chat")
        common = {**self.common, "object": "chat.completion.chunk" if chat else "text_completion"}

        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return _event({**common, "choices": choices, **more})

        def choice(index: int, text: str, reason: str | None = None, **delta: Any) -> dict[str, Any]:
            body = {"delta": {**delta, "content": text}} if chat else {"text": text}
            return {"index": index, **body, "logprobs": None, "finish_reason": reason}

        try:
            for index, text in enumerate(self.echo):
                if chat or text:
                    yield event([choice(index, text, role="assistant") if chat else choice(index, text)])
            texts = [""] * len(self.generations)  # so far
            async for index, text, last in self.pieces():
                calls: list[dict[str, Any]] = []
                texts[index] += text
                if last or self.tools is not None:  # which may be called
                    content, calls = self._content(index, texts[index]) if last else (None, [])
                    text = text if self.tools is None else content or ""
                if text:
                    yield event([choice(index, text)])
                for i, call in enumerate(calls):
                    named = {**call, "index": i, "function": {**call["function"], "arguments": ""}}
                    arguments = {"index": i, "function": {"arguments": call["function"]["arguments"]}}
                    for part in (named, arguments):
                        delta = {"delta": {"tool_calls": [part]}, "logprobs": None, "finish_reason": None}
                        yield event([{"index": index, **delta}])
                if last:
                    generation = self.generations[index]
                    end = choice(index, "", "tool_calls" if calls else generation.finish_reason)
                    end["logprobs"] = self.logprobs(generation, self.echo[index] + texts[index])
                    yield event([end])
            await self.at_end()
            if include_usage:
                yield event([], usage=self.usage())
        except ApiError as error:
            yield _event(error.body())
        yield b"data: [DONE]\n\n"


async def _nothing() -> None:
    pass


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _entry(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.token.encode())}


def _by_text(top: tuple[TokenLogprob, ...]) -> dict[str, float]:
    """Log-probabilities by text: of tokens with the same one, the likeliest counts."""
    found: dict[str, float] = {}
    for one in top:
        found.setdefault(one.token, one.logprob)
    return found


def _failure(generation: Generation) -> ApiError:
    if generation.finish_reason == "cancelled":
        return ApiError(503, "the request was cancelled", code="cancelled")
    return ApiError(500, generation.error or "the request failed", headers={"x-should-retry": "false"})
