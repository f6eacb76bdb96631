"""The endpoints of a real server, with OpenAI's own client where that is installed."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import write_lora

from litgpt.api import LLM

from .conftest import serving

openai = pytest.importorskip("openai", reason="pip install '.[test]'")
HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def call(url, body=None, method=None, headers=None, data=None):
    """Status, headers and body of a plain request."""
    data = json.dumps(body).encode() if body is not None else data
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def ask(client, text="Hello", **settings):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(messages=messages, **{**GREEDY, "max_tokens": 12, **settings})


def joined(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_chat_equals_generate(client, llm, server):
    answer = ask(client)
    expected = llm.generate("Hello", max_new_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"

    async def other():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
            return await client.chat.completions.create(messages=HELLO, max_tokens=12, **GREEDY)

    assert asyncio.run(other()).choices[0].message.content == expected


def test_streams_have_one_id_one_role_and_an_end(client, server):
    chunks = list(ask(client, stream=True))
    assert joined(chunks) == ask(client).choices[0].message.content
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert not chunks[-1].choices[0].delta.content
    body = {**GREEDY, "messages": HELLO, "max_tokens": 4, "stream": True}
    _, headers, text = call(f"{server}/v1/chat/completions", body)
    assert headers["content-type"].startswith("text/event-stream")
    assert text.endswith(b"data: [DONE]\n\n")
    assert all(line.startswith(b"data: ") for line in text.split(b"\n\n")[:-1])


def test_usage_is_in_whole_answers_and_in_streams_that_ask_for_it(client):
    usage = ask(client).usage
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
    assert usage.prompt_tokens_details.cached_tokens >= 0
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_are_not_in_it(client, stream):
    whole = ask(client, max_tokens=40).choices[0].message.content
    stop = whole[10:13]
    for given in (stop, ["never there", stop]):
        answer = ask(client, max_tokens=40, stop=given, stream=stream)
        text = joined(answer) if stream else answer.choices[0].message.content
        assert text == whole[: whole.index(stop)]
    assert ask(client, max_tokens=40, stop=stop).choices[0].finish_reason == "stop"


def test_pieces_of_characters_are_not_sent(client):
    for seed in range(4):
        settings = {"max_tokens": 25, "temperature": 1.5, "seed": seed}
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **settings) if chunk.choices
        ]
        assert "".join(pieces) == ask(client, **settings).choices[0].message.content


def test_n_answers_with_a_seed_are_repeatable(client, llm):
    settings = {"n": 3, "seed": 5, "temperature": 1.0, "extra_body": {"top_k": 0}}
    first, second = ask(client, **settings), ask(client, **settings)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts == [llm.generate("Hello", max_new_tokens=12, seed=seed) for seed in (5, 6, 7)]
    pieces = {0: "", 1: "", 2: ""}
    for chunk in ask(client, stream=True, **settings):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(pieces.values()) == texts


def test_logprobs_have_the_documented_shape(client):
    content = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(content) == 12
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    answer = client.completions.create(prompt="Hello", logprobs=3, max_tokens=5, **GREEDY).choices[0]
    assert len(answer.logprobs.tokens) == len(answer.logprobs.token_logprobs) == len(answer.logprobs.text_offset) == 5


def test_both_names_of_the_limit_and_none(client):
    assert ask(client, max_completion_tokens=3, max_tokens=None).usage.completion_tokens == 3
    usage = ask(client, max_tokens=None).usage
    assert usage.total_tokens <= 512


def test_sampling_is_honoured(client, llm):
    settings = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
    biased = ask(client, logit_bias={"70": 100}).choices[0].message.content
    assert len(set(biased)) == 1
    assert ask(client, **settings).choices[0].message.content == llm.generate(
        "Hello", max_new_tokens=12, temperature=0, **settings
    )


def test_contents_and_roles_that_clients_send(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert ask(client, parts).choices == ask(client).choices
    with pytest.raises(openai.BadRequestError, match="image_url"):
        ask(client, [{"type": "image_url", "image_url": {"url": "data:,"}}])
    tool = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be short."},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [tool]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert client.chat.completions.create(messages=messages, max_tokens=2, **GREEDY).choices


def test_unknown_and_null_fields_are_ignored(client):
    extra = {"unknown": {"a": 1}, "stop": None, "seed": None, "n": None, "stream_options": None, "tools": None}
    assert ask(client, extra_body=extra).choices == ask(client).choices


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["llama", "alpaca"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait"}},
]


def test_answers_follow_a_schema(client):
    pytest.importorskip("llguidance")
    hot = {"temperature": 3.0, "max_tokens": 80, "extra_body": {"top_k": 0}}
    asked = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    answer = ask(client, response_format=asked, n=3, seed=1, **hot)
    found = [json.loads(choice.message.content) for choice in answer.choices]
    assert all(one["kind"] in ("llama", "alpaca") and 0 <= one["age"] <= 9 for one in found)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    text = ask(client, response_format={"type": "json_object"}, **hot, seed=2, stop="}").choices[0].message.content
    assert text.startswith("{")
    for wrong in (
        {"type": "json_schema"},
        {"type": "yaml"},
        {"type": "json_schema", "json_schema": {"schema": {"type": 3}}},
    ):
        with pytest.raises(openai.BadRequestError, match="response_format"):
            ask(client, response_format=wrong)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_tools_that_have_to_be_called_are(client, choice):
    pytest.importorskip("llguidance")
    settings = {"tools": TOOLS[:1], "tool_choice": choice, "temperature": 2.0, "seed": 3, "max_tokens": 150}
    answer = ask(client, **settings).choices[0]
    (call,) = answer.message.tool_calls
    assert (answer.finish_reason, call.function.name, answer.message.content) == ("tool_calls", "look", None)
    assert json.loads(call.function.arguments)["kind"] in ("llama", "alpaca")
    stream = client.chat.completions.stream(model="tiny", messages=HELLO, extra_body={"top_k": None}, **settings)
    with stream as events:
        for _ in events:
            pass
        final = events.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.role) == ("tool_calls", "assistant")
    assert final.message.tool_calls[0].function.arguments == call.function.arguments


def test_tools_may_be_left_alone(client):
    answer = ask(client, tools=TOOLS).choices[0]
    assert answer.message.content == joined(ask(client, tools=TOOLS, stream=True))
    assert answer.message.tool_calls is None
    assert ask(client, tools=TOOLS, tool_choice="none").choices == ask(client).choices
    for settings in ({"tools": [{"type": "x"}]}, {"tools": TOOLS, "tool_choice": {"function": {"name": "none such"}}}):
        with pytest.raises(openai.BadRequestError, match="tool"):
            ask(client, **settings)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "n": 1000}, "n"),
        ({"messages": HELLO, "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 999}, "top_logprobs"),
        ({"messages": HELLO, "stop": 3}, "stop"),
        ({"messages": HELLO, "model": 3}, "model"),
        ({"messages": HELLO, "stream": "yes"}, "stream"),
        ({"messages": HELLO, "temperature": -1}, None),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ],
)
def test_bad_requests_name_what_is_wrong(server, body, param):
    status, _, text = call(f"{server}/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, param)
    assert set(error) == {"message", "type", "param", "code"}


def test_a_prompt_too_long_has_its_own_code(client):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "x" * 600)
    assert error.value.code == "context_length_exceeded"


def test_paths_methods_and_bodies(server):
    chat = f"{server}/v1/chat/completions"
    assert call(f"{server}/nowhere")[0] == 404
    assert call(chat, method="GET")[0] == 405
    assert call(chat, data=b"{")[0] == call(chat, data=b"[1]")[0] == call(chat, data=b"[" * 100_000)[0] == 400
    assert call(f"{server}/v1/embeddings", {"input": "x"})[0] == 501
    assert call(chat, data=b"x" * 17_000_000)[0] == 413
    status, _, text = call(f"{server}/health")
    assert (status, text) == (200, b"ok")
    assert call(server)[0] == call(f"{server}/livez")[0] == 200


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "litgpt"
    assert ask(client, model="another").model == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_completions_take_texts_and_tokens(client, llm):
    def texts(prompt, **settings):
        answer = client.completions.create(prompt=prompt, max_tokens=5, **GREEDY, **settings)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    one, two = texts("Hello")[0], texts("Bye")[0]
    tokens = llm.tokenizer.encode("Hello").tolist()
    assert texts(["Hello", "Bye"]) == [one, two]
    assert texts(tokens) == [one]
    assert texts([tokens, tokens]) == [one, one]
    assert texts("Hello", echo=True) == ["Hello" + one]
    with pytest.raises(openai.BadRequestError, match="suffix"):
        texts("Hello", suffix="x")
    with pytest.raises(openai.BadRequestError, match="tools"):
        texts("Hello", extra_body={"tools": [{"type": "function", "function": {"name": "f"}}]})
    with pytest.raises(openai.BadRequestError, match="400"):
        texts([10**6])


def test_requests_at_once_get_their_own_answers(client, llm):
    prompts = ["a" * n for n in (1, 40, 3, 120, 7, 60, 2, 9)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: ask(client, text).choices[0].message.content, prompts))
    assert answers == [llm.generate(text, max_new_tokens=12, temperature=0) for text in prompts]


def test_second_turns_are_read_from_the_cache(client):
    first = ask(client, "Tell me about llamas. " * 5)
    messages = [{"role": "user", "content": "Tell me about llamas. " * 5}]
    ask(client, "Make a title for this.")
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *HELLO]
    second = client.chat.completions.create(messages=messages, max_tokens=3, **GREEDY)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_turns_after_calls_of_tools_are_read_from_the_cache(client):
    pytest.importorskip("llguidance")
    asked = [{"role": "user", "content": "Look."}]
    settings = {"tools": TOOLS[:1], "max_tokens": 150, "temperature": 2.0, "seed": 3, "model": "tiny"}
    first = client.chat.completions.create(messages=asked, tool_choice="required", **settings)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It is at home."}
    messages = [*asked, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(messages=messages, **settings)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_streams_have_nothing_that_clients_stumble_over(server):
    body = json.dumps({**GREEDY, "messages": HELLO, "max_tokens": 6, "stream": True})
    command = ["curl", "-sN", f"{server}/v1/chat/completions", "-H", "content-type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:  # no comments, ids, or empty frames
        assert json.loads(line.removeprefix("data: "))["choices"][0]["delta"] is not None


def test_metrics_and_the_view_of_the_caches(server, client):
    ask(client)
    text = call(f"{server}/metrics")[2].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["litgpt_generated_tokens_total"]) >= 12
    assert float(values["litgpt_requests_running"]) == 0
    view = json.loads(call(f"{server}/v1/cache")[2])["tiny"]
    assert len(view["layers"]) == 2
    assert view["prefixes"]["bytes"] > 0


def test_a_client_that_leaves_frees_its_row(server, client):
    body = json.dumps({**GREEDY, "messages": HELLO, "max_tokens": 480, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(6):
        with socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1]))) as connection:
            connection.sendall(head + body)
            connection.recv(200)
    until = time.monotonic() + 5
    while "litgpt_requests_running 0" not in call(f"{server}/metrics")[2].decode() and time.monotonic() < until:
        time.sleep(0.05)
    assert "litgpt_requests_running 0" in call(f"{server}/metrics")[2].decode()
    assert ask(client).choices


def test_keys_pages_of_others_and_litgpts_endpoint(checkpoint, llm):
    options = "--api_key", "secret", "--cors", "http://page", "--strict_model", "--temperature", 0, "--stream"
    with serving(checkpoint, *options) as (server, process):
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
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_lora_weights_are_served_beside_the_model(checkpoint, llm, tmp_path):
    write_lora(checkpoint, tmp_path / "kind" / "final")
    write_lora(checkpoint, tmp_path / "other", seed=1)
    expected = [llm.generate("Hello", max_new_tokens=12, temperature=0)]
    for folder in (tmp_path / "kind" / "final", tmp_path / "other"):
        expected.append(LLM.load(folder, precision="32-true").generate("Hello", max_new_tokens=12, temperature=0))
    assert len(set(expected)) == 3
    with serving(checkpoint, "--lora", f"{tmp_path / 'kind' / 'final'},second={tmp_path / 'other'}") as (server, _):
        client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
        names = [model.id for model in client.models.list()]
        assert names == ["tiny", "kind", "second"]
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda name: ask(client, model=name), names * 2))
        assert [answer.choices[0].message.content for answer in answers] == expected * 2
        assert [answer.model for answer in answers] == names * 2


def test_predict_and_a_full_queue(checkpoint, llm):
    options = "--batch_size", 1, "--max_queue", 1, "--temperature", 0, "--max_new_tokens", 400
    with serving(checkpoint, *options) as (server, process):
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: call(f"{server}/predict", {"prompt": "Hello"}), range(6)))
        refused = [headers for status, headers, _ in found if status == 429]
        assert refused
        assert all(headers["retry-after"] for headers in refused)
        expected = llm.generate("Hello", temperature=0, max_new_tokens=400)
        assert {json.loads(text)["output"] for status, _, text in found if status == 200} == {expected}
        assert call(f"{server}/predict", {"text": "Hello"})[0] == 400
