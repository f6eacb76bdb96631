"""A server that is not ready, or in which something has gone wrong."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from until import until

from .asking import HELLO, call
from .conftest import Forked, serving
from .faulty import run

BODY = {"messages": HELLO, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def faulty(checkpoint, tmp_path_factory):
    orders = tmp_path_factory.mktemp("orders")
    (orders / "wait").touch()
    options = "--batch_size", 1, "--timeout", 1, "--max_seconds", 100, "--grace", 0
    start = partial(Forked, run=partial(run, orders, 0.5))
    with serving(checkpoint, *options, wait="/livez", start=start) as (server, _):
        yield server, orders


def test_a_server_goes_through_its_troubles(faulty, llm):
    server, orders = faulty

    def ask(**settings):
        return call(f"{server}/v1/chat/completions", {**BODY, **settings})

    def health():
        return call(f"{server}/health")[0], call(f"{server}/livez")[0]

    # the model is being loaded
    assert health() == (503, 200)
    status, headers, _ = ask()
    assert (status, headers["retry-after"]) == (503, "2")
    (orders / "wait").unlink()
    until(lambda: health() == (200, 200))
    expected = llm.generate("Hello", max_new_tokens=8, temperature=0)

    def is_right(answer):
        return answer[0] == 200 and json.loads(answer[2])["choices"][0]["message"]["content"] == expected

    # a step fails: its request gets an error, and others their answers
    (orders / "fail").touch()
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: ask(), range(3)))
    failed = [(headers, json.loads(text)["error"]) for status, headers, text in answers if status == 500]
    ((headers, error),) = failed
    assert headers["x-should-retry"] == "false"
    assert "the step has failed" in error["message"]
    assert all(is_right(answer) for answer in answers if answer[0] not in (500, 504))
    until(lambda: health() == (200, 200))
    (orders / "fail").touch()
    status, _, text = ask(stream=True)
    *events, last = [event.removeprefix(b"data: ") for event in text.split(b"\n\n")[:-1]]
    assert (status, last) == (200, b"[DONE]")
    assert "the step has failed" in json.loads(events[-1])["error"]["message"]

    # a step takes long: requests that wait for their turn are told so, and the health check notices it
    (orders / "hang").touch()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask)
        until(lambda: health() == (503, 200))
        status, headers, text = ask()
        assert (status, json.loads(text)["error"]["code"], headers["retry-after"]) == (504, "timeout", "1")
        assert call(f"{server}/v1/cache")[0] == 504
        (orders / "hang").unlink()
        assert first.result()[0] in (200, 504)
    until(lambda: health() == (200, 200))
    until(lambda: is_right(ask()))

    # the engine's thread is gone: nobody waits for it
    (orders / "die").touch()
    assert ask()[0] == 500
    assert health() == (503, 200)
    status, headers, _ = ask()
    assert (status, headers["x-should-retry"]) == (503, "false")
