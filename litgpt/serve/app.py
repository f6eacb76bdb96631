"""The endpoints."""

import asyncio
import hmac
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

import torch

from litgpt.engine.engine import check_vocabulary
from litgpt.engine.service import Generation, Service
from litgpt.errors import describe
from litgpt.serve.answers import Answers
from litgpt.serve.cache_view import cache_view
from litgpt.serve.conversations import ChatPrompt
from litgpt.serve.errors import ApiError, bad_request
from litgpt.serve.grammar import follow_schema, schema_of
from litgpt.serve.http import (
    Disconnected,
    Receive,
    Scope,
    Send,
    read_json,
    send_error,
    send_json,
    send_response,
    send_stream,
    unless_disconnected,
)
from litgpt.serve.metrics import prometheus
from litgpt.serve.options import ServeOptions
from litgpt.serve.parameters import (
    choices_of,
    flag,
    messages_of,
    number,
    sampling_of,
    stops_of,
    streaming_of,
)
from litgpt.serve.served import ServedModel
from litgpt.serve.states import check_name, list_states, remove_state, save_state
from litgpt.serve.tools import Tools

T = TypeVar("T")
STUCK_AFTER = 120  # seconds of one step
_PAGE = Path(__file__).with_name("page.html")
_OPEN = ("/", "/health", "/livez")  # need no key
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, OPTIONS",
    "access-control-allow-headers": "authorization, content-type, x-api-key",
    "access-control-max-age": "600",
}


class App:
    """The ASGI application. Until the models are loaded, `models` is empty and requests get status 503."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.models: dict[str, ServedModel] = {}
        self.service: Service | None = None
        self.draining = False
        self.counts: Counter[tuple[str, int]] = Counter()
        self.started = time.time()
        self._key = options.key
        self._routes: dict[tuple[str, str], Callable[[Scope, Receive, Send], Awaitable[None]]] = {
            ("GET", "/"): self._page,
            ("GET", "/health"): self._health,
            ("GET", "/livez"): self._livez,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/info"): self._info,
            ("GET", "/v1/models"): self._list_models,
            ("GET", "/v1/cache"): self._cache,
            ("GET", "/v1/states"): self._states,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completions,
            ("POST", options.api_path): self._predict,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            return
        status = 0

        async def counting(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *self._cors(scope)]}
            await send(message)

        try:
            await self._answer(scope, receive, counting)
        except (Disconnected, OSError, asyncio.TimeoutError, TimeoutError):
            pass
        except ApiError as error:
            if not status:
                await send_error(counting, error)
        finally:
            known = {path for _, path in self._routes}
            self.counts[scope["path"] if scope["path"] in known else "other", status] += 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        headers = dict(scope["headers"])
        self._check_origin(headers)
        if method == "OPTIONS":
            await send_response(send, 204, b"", "text/plain", _PREFLIGHT if self.options.cors else None)
            return
        if path not in _OPEN:
            self._check_key(headers)
        method = "GET" if method == "HEAD" else method
        if handler := self._routes.get((method, path)):
            await handler(scope, receive, send)
        elif method == "GET" and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            self._loaded()
            if name not in self.models:
                raise ApiError(404, f"there is no model {name!r:.80}", "model", "model_not_found")
            await send_json(send, self._describe(name))
        elif path.startswith("/v1/states/") and method in ("PUT", "DELETE"):
            await self._state(method, path.removeprefix("/v1/states/"), scope, receive, send)
        elif path in ("/v1/embeddings", "/v1/responses"):
            raise ApiError(501, f"{path} is not supported: use /v1/chat/completions or /v1/completions")
        elif allowed := [known for known, place in self._routes if place == path]:
            raise ApiError(405, f"{path} takes {' and '.join(allowed)}", headers={"allow": ", ".join(allowed)})
        else:
            raise ApiError(404, f"there is nothing at {path:.80}")

    # -- who may ask

    def _cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        if not self.options.cors:
            return []
        return [(b"access-control-allow-origin", self.options.cors.encode()), (b"vary", b"origin")]

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """A web page of another origin could otherwise use a server that needs no key."""
        origin, host = headers.get(b"origin"), headers.get(b"host", b"")
        allowed = self.options.cors in ("*", None if origin is None else origin.decode("latin-1"))
        if origin is not None and not allowed and origin.partition(b"://")[2] != host:
            raise ApiError(403, "web pages of other origins may use this server only with --cors")

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key is None:
            return
        given = headers.get(b"x-api-key", b"")
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = bearer.strip()
        if not hmac.compare_digest(given, self._key.encode()):
            raise ApiError(401, "this server needs a valid API key", code="invalid_api_key")

    # -- the server

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.models:
            await send_response(send, 503, b"the model is being loaded", "text/plain", {"refresh": "1"})
            return
        await send_response(send, 200, _PAGE.read_bytes(), "text/html; charset=utf-8")

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        healthy = (
            self.service is not None
            and self.service.alive
            and time.monotonic() - self.service.heartbeat < STUCK_AFTER
            and not self.draining
        )
        await send_response(send, 200 if healthy else 503, b"ok" if healthy else b"not ready", "text/plain")

    async def _livez(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_response(send, 200, b"ok", "text/plain")

    async def _info(self, scope: Scope, receive: Receive, send: Send) -> None:
        models = {name: {"context": one.room, "batch_size": one.batch.batch_size} for name, one in self.models.items()}
        await send_json(send, {"models": models, "kv_cache": str(self.options.cache_spec())})

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = prometheus(self.service, self.models, self.counts)
        await send_response(send, 200, text.encode(), "text/plain; version=0.0.4")

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loaded()
        await send_json(send, {"object": "list", "data": [self._describe(name) for name in self.models]})

    def _describe(self, name: str) -> dict[str, Any]:
        context = self.models[name].room
        return {
            "id": name,
            "object": "model",
            "created": int(self.started),
            "owned_by": "litgpt",
            "context_length": context,
        }

    async def _cache(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._loaded()
        await send_json(
            send, await self._in_engine(service, lambda: {name: cache_view(one) for name, one in self.models.items()})
        )

    async def _in_engine(self, service: Service, function: Callable[[], T]) -> T:
        """What a function returns that the engine's thread calls between two steps."""
        loop, result = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def give(value: T | None, error: Exception | None) -> None:
            if not result.done():  # it is once the client has left
                result.set_result(value) if error is None else result.set_exception(error)

        def run() -> None:
            try:
                found = function(), None
            except Exception as error:
                found = None, ApiError(500, describe(error))
            loop.call_soon_threadsafe(give, *found)

        service.call(run)
        try:
            return await asyncio.wait_for(result, self.options.timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(504, "the engine did not answer in time", code="timeout") from None

    async def _states(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loaded()
        served = self._model({"model": _queried_model(scope)})
        await send_json(send, {"object": "list", "data": list_states(served)})

    async def _state(self, method: str, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Save the state of a conversation or a text by a name, or remove it."""
        if method == "DELETE":
            service, served = self._loaded(), self._model({"model": _queried_model(scope)})
            await remove_state(service, served, name)
            await send_json(send, {"id": name, "object": "state", "deleted": True})
            return
        service, body = await self._body(receive)
        served = self._model(body)
        check_name(served, name)
        if "messages" in body:
            given, variables = (messages_of(body), Tools.of(body)), body.get("chat_template_kwargs") or {}
            with _rejections("messages"):
                tokens = await asyncio.to_thread(served.conversations.beginning, *given, **variables)
        else:
            tokens = await asyncio.to_thread(_encode, served, body.get("prompt"))
        self._check_room(served, tokens)
        self._check_queue(service, served, 1)
        saving = save_state(service, served, name, tokens)
        await send_json(send, await unless_disconnected(receive, saving))

    def _loaded(self) -> Service:
        if self.service is None or self.draining:
            what = "is shutting down" if self.draining else "is loading its model"
            raise ApiError(503, f"the server {what}", headers={"retry-after": "2"})
        if not self.service.alive:
            raise ApiError(503, "the engine has stopped", headers={"x-should-retry": "false"})
        return self.service

    # -- generating

    def _model(self, body: dict[str, Any]) -> ServedModel:
        name = body.get("model")
        if name is not None and not isinstance(name, str):
            raise bad_request("model must be a text", "model")
        if name is None or name in self.models or not self.options.strict_model:
            return self.models.get(name, next(iter(self.models.values())))
        raise ApiError(404, f"there is no model {name!r:.80}", "model", "model_not_found")

    def _generations(
        self,
        served: ServedModel,
        prompt: torch.Tensor,
        body: dict[str, Any],
        most: int | None,
        checkpoints: tuple[int, ...] = (),
        logprobs: int | None = None,
        tools: Tools | None = None,
    ) -> list[Generation]:
        """The answers to one prompt that a request asks for."""
        sampling, n = sampling_of(body, self.options.sampling()), choices_of(body)
        n_tokens = served.ready.model.config.padded_vocab_size
        for token in sampling.logit_bias or ():
            if token >= n_tokens:
                raise bad_request(f"logit_bias has the token {token}, but there are {n_tokens}", "logit_bias")
        if (logprobs or 0) > n_tokens:
            raise bad_request(f"there are only {n_tokens} tokens to give log-probabilities of", "top_logprobs")
        schema, param = schema_of(body), "response_format"
        if tools is not None and tools.forced:
            schema, param = tools.schema, "tool_choice"
        if schema is not None:
            sampling = replace(sampling, processors=(follow_schema(served.ready.tokenizer, schema, param),))
        self._check_room(served, prompt)
        left = served.room - (0 if served.limit is None else len(prompt))
        most = left if most is None else most if served.limit is None else min(most, left)
        return [
            Generation(
                served.name,
                prompt,
                most,
                replace(sampling, seed=sampling.seed + i),
                served.ready.stop_tokens,
                stops_of(body),
                logprobs,
                checkpoints,
            )
            for i in range(n)
        ]

    def _check_room(self, served: ServedModel, prompt: torch.Tensor) -> None:
        if served.limit is not None and len(prompt) >= served.room:
            raise bad_request(
                f"the prompt has {len(prompt):,} tokens, which leaves no room for an answer in the {served.room:,} of the context",
                "messages",
                "context_length_exceeded",
            )

    def _check_queue(self, service: Service, served: ServedModel, new: int) -> None:
        busy = service.unfinished + new > served.batch.batch_size
        if busy and service.waiting + new > max(self.options.max_queue, new):
            raise ApiError(429, "too many requests are waiting", code="queue_full", headers={"retry-after": "1"})

    async def _run(
        self, receive: Receive, answers: Answers, work: Callable[[], Awaitable[None]], service: Service
    ) -> None:
        """Generate, and cancel what is left when `work` ends or the client leaves."""
        self._check_queue(service, answers.served, len(answers.generations))
        for generation in answers.generations:
            service.submit(generation)
        loop, cut = asyncio.get_running_loop(), None
        if self.options.max_seconds is not None:
            cut = loop.call_later(self.options.max_seconds, lambda: [service.cut(one) for one in answers.generations])
        try:
            await unless_disconnected(receive, work())
        finally:
            if cut is not None:
                cut.cancel()
            for generation in answers.generations:
                if generation.finish_reason is None:
                    service.cancel(generation)

    async def _body(self, receive: Receive) -> tuple[Service, dict[str, Any]]:
        service = self._loaded()
        return service, await read_json(receive, self.options.max_body * 1_000_000)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, body = await self._body(receive)
        served, messages, tools = self._model(body), messages_of(body), Tools.of(body)
        stream, include_usage = streaming_of(body)
        most = number(body, "max_completion_tokens", number(body, "max_tokens", least=1), least=1)
        variables = body.get("chat_template_kwargs") or {}
        logprobs = number(body, "top_logprobs", 0, least=0) if flag(body, "logprobs") else None
        prompt = await asyncio.to_thread(_chat_prompt, served, messages, tools, variables, "messages")
        generations = await asyncio.to_thread(
            self._generations, served, prompt.tokens, body, most, prompt.checkpoints, logprobs, tools
        )
        answers = Answers(served, generations, "chat.completion", self.options.timeout, tools=tools)

        async def note() -> None:
            for one, message in zip(generations, answers.messages, strict=True):
                if one.finish_reason in ("stop", "length") and not one.text.stopped:
                    await asyncio.to_thread(served.conversations.note, prompt, one.sequence.output, message)

        answers.at_end = note
        await self._deliver(receive, send, answers, stream, include_usage, service)

    async def _deliver(
        self, receive: Receive, send: Send, answers: Answers, stream: bool, include_usage: bool, service: Service
    ) -> None:
        async def work() -> None:
            if stream:
                await send_stream(send, answers.stream(include_usage), "text/event-stream; charset=utf-8")
            else:
                await send_json(send, await answers.whole())

        await self._run(receive, answers, work, service)

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, body = await self._body(receive)
        served = self._model(body)
        for name in ("suffix", "tools"):
            if body.get(name):
                raise bad_request(f"{name} is not supported in /v1/completions", name)
        stream, include_usage = streaming_of(body)
        most = number(body, "max_tokens", 16, least=1)
        logprobs = number(body, "logprobs", least=0)
        echo = flag(body, "echo")
        generations, texts = [], []
        for prompt in _prompts(body.get("prompt")):
            tokens = await asyncio.to_thread(_encode, served, prompt)
            own = self._generations(served, tokens, body, most, logprobs=logprobs)
            for one in own:
                one.logprobs_of_prompt = echo and logprobs is not None
            generations += own
            texts += [served.ready.tokenizer.decode(tokens.tolist()) if echo else ""] * len(own)
        answers = Answers(served, generations, "text_completion", self.options.timeout, texts)
        await self._deliver(receive, send, answers, stream, include_usage, service)

    async def _predict(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, body = await self._body(receive)
        served, prompt = self._model(body), body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise bad_request('the body must have a "prompt", a text', "prompt")
        messages = [{"role": "user", "content": prompt}]
        prompt = await asyncio.to_thread(_chat_prompt, served, messages, None, {}, "prompt")
        most = number(body, "max_new_tokens", self.options.max_new_tokens, least=1)
        generations = self._generations(served, prompt.tokens, body, most, prompt.checkpoints)[:1]
        answers = Answers(served, generations, "text_completion", self.options.timeout)

        async def lines() -> Any:
            async for _, text, _ in answers.pieces():
                if text:
                    yield (json.dumps({"output": text}, ensure_ascii=False) + "\n").encode()

        async def work() -> None:
            if self.options.stream:
                await send_stream(send, lines(), "application/x-ndjson")
            else:
                await send_json(send, {"output": (await answers.whole())["choices"][0]["text"]})

        await self._run(receive, answers, work, service)


def _chat_prompt(
    served: ServedModel, messages: list[dict[str, Any]], tools: Tools | None, variables: Any, param: str
) -> ChatPrompt:
    with _rejections(param):
        return served.conversations.prompt(messages, tools, **variables)


@contextmanager
def _rejections(param: str) -> Iterator[None]:
    """Bad requests for what a chat template rejects."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise bad_request(str(error), param) from None


def _queried_model(scope: Scope) -> str | None:
    return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model", [None])[0]


def _prompts(given: Any) -> Iterable[str | list[int]]:
    """The prompts of /v1/completions: a text, tokens, or a list of such."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise bad_request("prompt must be a text, a list of texts, or tokens", "prompt")
    return given if all(isinstance(one, str | list) for one in given) else [given]


def _encode(served: ServedModel, prompt: Any) -> torch.Tensor:
    if isinstance(prompt, str):
        tokens = served.ready.tokenizer.encode(prompt)
    elif isinstance(prompt, list) and all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in prompt
    ):
        tokens = torch.tensor(prompt, dtype=torch.int64)
    else:
        raise bad_request("the prompt must be a text or a list of token ids", "prompt")
    if not len(tokens):
        raise bad_request("the prompt is empty", "prompt")
    try:
        check_vocabulary(tokens.tolist(), served.ready.model.config.padded_vocab_size)
    except ValueError as error:
        raise bad_request(str(error), "prompt") from None
    return tokens
