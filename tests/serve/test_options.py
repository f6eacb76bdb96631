"""Servers with options of their own."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from tiny import write_lora
from until import LIMIT, until

from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.serve.base import Server

from .asking import GREEDY, HELLO, ask, call, read_all, stream_socket
from .conftest import Forked, serving
from .faulty import run

openai = pytest.importorskip("openai", reason="pip install '.[test]'")


@pytest.fixture
def hanging(tmp_path):
    """Starts a server whose steps do not end while `hanging.order` exists."""
    start = partial(Forked, run=partial(run, tmp_path, 120))
    start.order = tmp_path / "hang"
    return start


def test_keys_pages_of_others_and_litgpts_endpoint(checkpoint, llm, hanging):
    options = "--api_key", "secret", "--cors", "http://page", "--strict_model", "--temperature", 0, "--stream"
    options += "--grace", 0
    with serving(checkpoint, *options, start=hanging) as (server, process):
        models = f"{server}/v1/models"
        assert call(models)[0] == call(models, headers={"X-API-Key": "wrong"})[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert call(models, headers=key)[0] == call(models, headers={"X-API-Key": "secret"})[0] == 200
        status, headers, _ = call(models, method="OPTIONS", headers={"Origin": "http://page"})
        assert (status, headers["access-control-allow-origin"]) == (204, "http://page")
        assert call(models, headers={**key, "Origin": "http://other"})[0] == 403
        body = {"messages": HELLO, "model": "another"}
        assert json.loads(call(f"{server}/v1/chat/completions", body, headers=key)[2])["error"]["code"] == (
            "model_not_found"
        )
        _, _, lines = call(f"{server}/predict", {"prompt": "Hello"}, headers=key)
        text = "".join(json.loads(line)["output"] for line in lines.splitlines())
        assert text == llm.generate("Hello", temperature=0)
        asked = {**GREEDY, "messages": HELLO, "max_tokens": 480, "n": 8}
        running = stream_socket(server, asked, {"Authorization": "Bearer secret"})
        head = running.recv(1 << 16)
        hanging.order.touch()
        process.send_signal(signal.SIGTERM)
        until(lambda: call(f"{server}/health")[0] == 503)
        hanging.order.unlink()
        text = read_all(running, head)
        assert process.wait(LIMIT) == 0
    assert b'"message": "the server was shut down"' in text
    assert text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_port_in_use_is_said_in_one_line_and_nothing_is_loaded(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(Server, "load", lambda self: pytest.fail("the model is loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(checkpoint), "--port", str(port)]) == 1
    line = f"litgpt: error: cannot listen at 127.0.0.1:{port}: the port is in use: choose another --port\n"
    assert capsys.readouterr().err == line


def test_lora_weights_are_served_beside_the_model(checkpoint, llm, tmp_path, hanging):
    write_lora(checkpoint, tmp_path / "kind" / "final")
    write_lora(checkpoint, tmp_path / "other", seed=1)
    expected = [llm.generate("Hello", max_new_tokens=12, temperature=0)]
    for folder in (tmp_path / "kind" / "final", tmp_path / "other"):
        expected.append(LLM.load(folder, precision="32-true").generate("Hello", max_new_tokens=12, temperature=0))
    assert len(set(expected)) == 3
    loras = f"{tmp_path / 'kind' / 'final'},second={tmp_path / 'other'}"
    with serving(checkpoint, "--lora", loras, start=hanging) as (server, process):
        client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
        names = [model.id for model in client.models.list()]
        assert names == ["tiny", "kind", "second"]
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda name: ask(client, model=name), names * 2))
        assert [answer.choices[0].message.content for answer in answers] == expected * 2
        assert [answer.model for answer in answers] == names * 2
        running = stream_socket(server, {**GREEDY, "messages": HELLO, "max_tokens": 480, "n": 32})
        running.recv(1)
        hanging.order.touch()
        process.send_signal(signal.SIGTERM)
        until(lambda: call(f"{server}/health")[0] == 503)
        process.send_signal(signal.SIGTERM)
        hanging.order.unlink()
        assert process.wait(LIMIT) == 0
        assert read_all(running).count(b"data: ") < 32 * 480  # the end did not wait for all 32


def test_caches_that_evict_take_any_prompt_and_a_server_lets_answers_end(checkpoint, llm, hanging):
    cache = {"kv_cache": "lastrec", "cache_length": 100}
    options = [x for name, value in cache.items() for x in (f"--{name}", value)]
    with serving(checkpoint, *options, start=hanging) as (server, process):
        chat, body = f"{server}/v1/chat/completions", {**GREEDY, "messages": [{"role": "user", "content": "x" * 900}]}
        expected = llm.generate("x" * 900, max_new_tokens=200, temperature=0, **cache)
        running = stream_socket(server, {**body, "max_tokens": 200})
        head = running.recv(1 << 16)
        hanging.order.touch()
        process.send_signal(signal.SIGTERM)
        until(lambda: call(f"{server}/health")[0] == 503)
        status, headers, _ = call(chat, body)
        assert (status, headers["retry-after"]) == (503, "2")
        hanging.order.unlink()
        events = read_all(running, head).split(b"data: ")[1:-1]
        assert process.wait(LIMIT) == 0
    assert "".join(json.loads(event.split(b"\n")[0])["choices"][0]["delta"]["content"] for event in events) == expected


def test_states_are_saved_by_name_and_outlive_the_server(checkpoint, tmp_path):
    kind = "--kv_cache", "h2o", "--cache_length", 100, "--prefix_cache", 0, "--state_dir", tmp_path / "states"
    system = [{"role": "system", "content": "Be kind to llamas. " * 4}]
    asked = {**GREEDY, "messages": [*system, *HELLO], "max_tokens": 9}

    def answer(server):
        found = json.loads(call(f"{server}/v1/chat/completions", asked)[2])
        return found["usage"]["prompt_tokens_details"]["cached_tokens"], found["choices"][0]["message"]["content"]

    with serving(checkpoint, *kind) as (server, _):
        assert answer(server)[0] == 0
        status, _, text = call(f"{server}/v1/states/llamas", {"messages": system}, method="PUT")
        saved = json.loads(text)
        assert (status, saved["id"]) == (200, "llamas")
        assert (
            saved["tokens"] == len(system[0]["content"]) + 3
        )  # of bytes; with the system's, its end's and the user's token
        cached, text = answer(server)
        assert cached == saved["tokens"]
        for name in ("..%2Fout", "a/../b", ".hidden", "x" * 65, "%00"):
            assert call(f"{server}/v1/states/{name}", {"messages": system}, method="PUT")[0] == 400
        assert call(f"{server}/v1/states/a", {"prompt": 3}, method="PUT")[0] == 400
        assert call(f"{server}/v1/states/none", method="DELETE")[0] == 404
    assert [path.name for path in tmp_path.rglob("*.state")] == ["llamas.state"]
    with serving(checkpoint, *kind) as (server, _):
        assert json.loads(call(f"{server}/v1/states")[2])["data"] == [saved]
        assert answer(server) == (cached, text)
        assert call(f"{server}/v1/states/llamas", method="DELETE")[0] == 200
        assert answer(server)[0] == 0
    assert list(tmp_path.rglob("*.state")) == []


def test_predict_and_a_full_queue(checkpoint, llm, hanging):
    options = "--batch_size", 1, "--max_queue", 1, "--temperature", 0, "--max_new_tokens", 150
    with serving(checkpoint, *options, start=hanging) as (server, process):
        hanging.order.touch()
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(call, f"{server}/predict", {"prompt": "Hello"}) for _ in range(6)]
            until(lambda: sum(one.done() for one in asked) >= 4)  # one may run, and one wait
            hanging.order.unlink()
        found = [one.result() for one in asked]
        refused = [headers for status, headers, _ in found if status == 429]
        assert len(refused) >= 4
        assert all(headers["retry-after"] for headers in refused)
        expected = llm.generate("Hello", temperature=0, max_new_tokens=150)
        assert {json.loads(text)["output"] for status, _, text in found if status == 200} == {expected}
        assert call(f"{server}/predict", {"text": "Hello"})[0] == 400
