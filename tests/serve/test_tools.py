"""Calls of tools in what models say."""

import json

import pytest
from tiny import tiny_tokenizer

from litgpt.serve.errors import ApiError
from litgpt.serve.grammar import follow_schema
from litgpt.serve.tools import Tools

TOOLS = Tools([], {"look": {}, "wait": {}})
LOOK = '{"name": "look", "arguments": {"at": 1}}'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (f"<tool_call>\n{LOOK}\n</tool_call>", None, ["look"]),
        (f"Well.<tool_call>{LOOK}</tool_call><tool_call>{LOOK}", "Well.", ["look", "look"]),
        (f" {LOOK} ", None, ["look"]),
        ('{"name": "wait", "parameters": {}}', None, ["wait"]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", []),
        ("Hello", "Hello", []),
    ],
)
def test_calls_are_read_and_all_else_stays_text(text, content, names):
    found, calls = TOOLS.calls(text)
    assert (found, [call["function"]["name"] for call in calls]) == (content, names)
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)


def test_without_the_package_answers_are_not_held_to_a_schema(monkeypatch):
    monkeypatch.setattr("litgpt.serve.grammar.find_spec", lambda name: None)
    with pytest.raises(ApiError, match="pip install 'litgpt\\[grammar\\]'") as error:
        follow_schema(tiny_tokenizer(), {"type": "object"}, "response_format")
    assert (error.value.status, error.value.param) == (400, "response_format")
