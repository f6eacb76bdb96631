"""Calls of tools in what models say."""

import json

import pytest

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
