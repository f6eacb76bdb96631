"""HTTP below the endpoints: bodies, answers, streams, and clients that leave."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from litgpt.serve.errors import ApiError, bad_request

T = TypeVar("T")
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
BODY_SECONDS = 60  # that a body may take to arrive
SEND_SECONDS = 120  # that a client may leave what it was sent unread
MOST_LEVELS = 100


async def read_json(receive: Receive, most: int) -> dict[str, Any]:
    """The JSON object of a request's body of at most `most` bytes."""
    data = bytearray()

    async def read() -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            data.extend(message.get("body", b""))
            if len(data) > most:
                raise ApiError(413, f"the body is larger than {most:,} bytes")
            more = message.get("more_body", False)

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
    try:
        body = json.loads(data)
        json.dumps(body).encode()  # text that UTF-8 cannot encode
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    return body


class Disconnected(Exception):
    """The client has left."""


async def send_response(
    send: Send, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None
) -> None:
    pairs = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    await send(_start(status, pairs))
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    await send_response(send, status, json.dumps(value, ensure_ascii=False).encode(), "application/json", headers)


async def send_error(send: Send, error: ApiError) -> None:
    await send_json(send, error.body(), error.status, error.headers)


async def send_stream(send: Send, pieces: AsyncIterator[bytes], content_type: str) -> None:
    """Send pieces as they come; a client that does not read makes only its own stream wait."""
    headers = {"content-type": content_type, "cache-control": "no-cache", "x-accel-buffering": "no"}
    await send(_start(200, headers))
    async for piece in pieces:
        message = {"type": "http.response.body", "body": piece, "more_body": True}
        await asyncio.wait_for(send(message), SEND_SECONDS)
    await send({"type": "http.response.body", "body": b""})


def _start(status: int, headers: dict[str, str]) -> dict[str, Any]:
    pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves.

    Raises:
        Disconnected: if it did.
    """

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
