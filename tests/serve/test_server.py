"""The endpoints of a real server, with OpenAI's own client where that is installed."""

import asyncio
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from until import LIMIT, until

from litgpt.serve.app import App
from litgpt.serve.base import Server
from litgpt.serve.options import ServeOptions

from .asking import GREEDY, HELLO, ask, call, joined, stream_socket

openai = pytest.importorskip("openai", reason="pip install '.[test]'")


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


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
    end = joined(chunks)[6:9]
    with client.chat.completions.stream(messages=HELLO, stop=end, max_tokens=12, **GREEDY) as events:
        final = events.until_done().get_final_completion().choices[0].message
    assert (final.role, final.content) == ("assistant", joined(chunks).partition(end)[0])
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
        answer = list(answer) if stream else answer
        text, last = (joined(answer), answer[-1]) if stream else (answer.choices[0].message.content, answer)
        assert text == whole[: whole.index(stop)]
        assert last.choices[0].finish_reason == "stop"


def test_pieces_of_characters_are_not_sent(client):
    for seed in range(4):
        settings = {"max_tokens": 25, "temperature": 1.5, "seed": seed}
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **settings) if chunk.choices
        ]
        assert "".join(pieces) == ask(client, **settings).choices[0].message.content


def test_characters_of_several_tokens_come_whole(client):
    pytest.importorskip("llguidance")
    said = '"é🦙漢字🏴‍☠️"'
    settings = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": said[1:-1]}}}}
    n_bytes = len(said.encode())
    for n in (3, 5, 11, n_bytes + 1):  # the first ones end within a character
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, max_tokens=n, **settings)]
        assert all(len(piece.rstrip("\ufffd")) <= 1 for piece in pieces)
        assert "\ufffd" not in "".join(pieces[:-2])
        assert "".join(pieces) == ask(client, max_tokens=n, **settings).choices[0].message.content
        assert said.startswith("".join(pieces).rstrip("\ufffd"))
    assert "".join(pieces) == said


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


def test_echo_has_the_logprobs_of_the_prompt(client, llm):
    tokens = llm.tokenizer.encode("Hello, llama")
    asked = {"prompt": [tokens.tolist(), tokens.tolist()[:5]], "echo": True, "logprobs": 2, "max_tokens": 1, **GREEDY}
    for _ in range(2):  # the second time the prompts are kept
        for choice, prompt in zip(client.completions.create(**asked).choices, (tokens, tokens[:5]), strict=True):
            found, expected = choice.logprobs, llm.model(prompt[None])[0].log_softmax(-1)
            own = expected[:-1].gather(1, prompt[1:, None])[:, 0].tolist()
            assert found.token_logprobs[:-1] == [None, *(pytest.approx(one, abs=1e-4) for one in own)]
            assert "".join(found.tokens[:-1]) == choice.text[: len(prompt)] == llm.tokenizer.decode(prompt)
            assert found.text_offset == list(range(len(prompt) + 1))
            assert found.top_logprobs[0] is None
            for top, row in zip(found.top_logprobs[1:], expected, strict=True):
                assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)


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
    found = final.message.tool_calls[0]
    assert (found.index, found.function.name, found.function.arguments) == (0, "look", call.function.arguments)
    assert found.id.startswith("call_")
    assert found.id.count("call_") == 1


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
    for url, method, status in (
        (f"{server}/nowhere", "GET", 404),
        (chat, "GET", 405),
        (f"{server}/v1/models", "PUT", 405),
    ):
        found, _, text = call(url, method=method)
        assert (found, list(json.loads(text)["error"])) == (status, ["message", "type", "param", "code"])
    assert call(chat, data=b"{")[0] == call(chat, data=b"[1]")[0] == call(chat, data=b"[" * 100_000)[0] == 400
    assert call(f"{server}/v1/states")[0] == call(f"{server}/v1/states/a", {"prompt": "a"}, method="PUT")[0] == 501
    for name in ("embeddings", "responses"):
        status, _, text = call(f"{server}/v1/{name}", {"input": "x"})
        assert (status, "is not supported" in json.loads(text)["error"]["message"]) == (501, True)
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
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:  # no comments, ids, or empty frames
        assert json.loads(line.removeprefix("data: "))["choices"][0]["delta"] is not None


def test_metrics_and_the_view_of_the_caches(server, client):
    for text in ("Hello", "Another"):  # what is known of a row is kept when another sequence comes
        ask(client, text)
    until(lambda: runs_nothing(server))  # neither what clients of other tests have left
    text = call(f"{server}/metrics")[2].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["litgpt_generated_tokens_total"]) >= 12
    view = json.loads(call(f"{server}/v1/cache")[2])["tiny"]
    assert len(view["layers"]) == 2
    assert view["prefixes"]["bytes"] > 0


def runs_nothing(server):
    return "litgpt_requests_running 0" in call(f"{server}/metrics")[2].decode()


def test_a_client_that_leaves_frees_its_row(server, client):
    for _ in range(6):
        with stream_socket(server, {**GREEDY, "messages": HELLO, "max_tokens": 480}) as connection:
            connection.recv(200)
    until(lambda: runs_nothing(server))
    assert ask(client).choices


def test_caches_that_read_prompts_twice_serve_one_answer_at_a_time(checkpoint):
    settings = {"checkpoint_dir": str(checkpoint), "precision": "32-true", "kv_cache": "kvzip", "cache_length": 32}
    servers = []
    for batch_size in (8, 1):
        options = ServeOptions(**settings, batch_size=batch_size)
        servers.append(Server(App(options), options))
        servers[-1].load()
    refused, alone = servers
    assert re.fullmatch(r"kvzip reads a long prompt twice.*\(--batch_size 1\).*", str(refused.failure))
    assert alone.failure is None
    alone.app.service.close()


def test_nobody_waits_for_a_client_that_does_not_read(checkpoint):
    """In this process, so that there are no buffers in between."""
    options = ServeOptions(checkpoint_dir=str(checkpoint), precision="32-true")
    app, sent = App(options), []
    Server(app, options).load()
    body = json.dumps({**GREEDY, "messages": HELLO, "max_tokens": 100, "stream": True}).encode()

    async def run():
        asked, read = asyncio.Queue(), asyncio.Event()
        asked.put_nowait({"type": "http.request", "body": body})

        async def send(message):
            sent.append(message.get("body", b""))
            if len(sent) > 3:
                await read.wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        answering = asyncio.create_task(app(scope, asked.get, send))
        while len(sent) < 4 or app.service.unfinished:
            await asyncio.sleep(0.01)
        assert len(sent) == 4
        read.set()
        await answering

    asyncio.run(asyncio.wait_for(run(), LIMIT))
    app.service.close()
    assert b"".join(sent).endswith(b"data: [DONE]\n\n")
