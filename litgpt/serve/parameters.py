"""Bodies of requests: their fields, checked."""

import json
import math
import secrets
from dataclasses import replace
from typing import Any

from litgpt.engine.sampling import Sampling
from litgpt.serve.errors import bad_request

MOST_CHOICES = 128
MOST_STOPS = 16
_SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def number(body: dict[str, Any], name: str, default: Any = None, least: float = -math.inf, whole: bool = True) -> Any:
    """A number of a body, `default` where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value < least:
        limit = "" if least == -math.inf else f" of at least {least:g}"
        raise bad_request(f"{name} must be a {'whole ' if whole else ''}number{limit}, got {value!r:.80}", name)
    return value


def flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false, got {value!r:.80}", name)
    return bool(value)


def sampling_of(body: dict[str, Any], defaults: Sampling) -> Sampling:
    """How a request wants its tokens to be drawn; without a seed it gets a random one."""
    given: dict[str, Any] = {}
    for name in _SAMPLING:
        if (value := number(body, name, whole=False)) is not None:
            given[name] = value
    if (top_k := number(body, "top_k", least=-1)) is not None:
        given["top_k"] = top_k if top_k > 0 else None
    bias = body.get("logit_bias")
    if bias is not None:
        try:
            given["logit_bias"] = {int(token): number(bias, token, whole=False) for token in bias}
        except (TypeError, ValueError, AttributeError):
            raise bad_request("logit_bias must be an object of token ids and numbers", "logit_bias") from None
    given["seed"] = number(body, "seed")
    if given["seed"] is None:
        given["seed"] = secrets.randbits(31)
    try:
        return replace(defaults, **given)
    except (ValueError, OverflowError) as error:
        raise bad_request(str(error)) from None


def stops_of(body: dict[str, Any]) -> tuple[str, ...]:
    """The stop strings."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(one, str) for one in stops):
        raise bad_request(f"stop must be a text or a list of up to {MOST_STOPS} texts", "stop")
    return tuple(one for one in stops if one)


def choices_of(body: dict[str, Any]) -> int:
    """The number of answers."""
    n = number(body, "n", 1, least=1)
    if n > MOST_CHOICES:
        raise bad_request(f"n must be at most {MOST_CHOICES}, got {n}", "n")
    return n


def streaming_of(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is streamed, and with a last chunk for the numbers of tokens."""
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise bad_request("stream_options must be an object", "stream_options")
    return flag(body, "stream"), flag(options or {}, "include_usage")


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation, with every content as text."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list of at least one message", "messages")
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_request(f"{where} must be an object with a role", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        if role not in ("system", "user", "assistant", "tool", "function"):
            raise bad_request(f"{where} has the role {message['role']!r:.40}", "messages")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, where) for part in content)
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise bad_request(f"{where} has no content", "messages")
        if content is not None and not isinstance(content, str):
            raise bad_request(f"the content of {where} must be a text or a list of parts", "messages")
        one = {**message, "role": role, "content": content or ""}
        if message.get("tool_calls"):
            one["tool_calls"] = _calls(message["tool_calls"], where)
        found.append(one)
    return found


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools, with their arguments as an object where they are JSON, as chat templates take them."""
    functions = (
        [call.get("function") if isinstance(call, dict) else None for call in calls]
        if isinstance(calls, list)
        else [None]
    )
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise bad_request(f'the tool_calls of {where} must be [{{"function": {{"name": ...}}}}, ...]', "messages")
    found = []
    for call, function in zip(calls, functions, strict=True):
        arguments = function.get("arguments")
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            parsed = arguments
        if parsed is not None:
            function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
        found.append({**call, "function": function})
    return found


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise bad_request(f"{where} has a part of type {kind!r:.40}: this model takes text only", "messages")
