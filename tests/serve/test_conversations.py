"""Conversations that go on from what is cached, however the chat template writes what the model wrote."""

import json

import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from litgpt.prompts import ChatTemplate
from litgpt.serve.conversations import Conversations
from litgpt.serve.parameters import messages_of
from litgpt.serve.tools import Tools

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TOOLS = Tools([TOOL], {"look": {"type": "object"}})
WITH_CALLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content | trim }}"
    '{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
ASK = [{"role": "system", "content": "Be kind to llamas."}, {"role": "user", "content": "Where is it?"}]


def conversations(template=CHAT_TEMPLATE, **settings):
    return Conversations(tiny_tokenizer(), ChatTemplate(template, eos_token="<|end|>"), **settings)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_CALLS, REASONING])
@pytest.mark.parametrize(
    "written",
    [" It is here. ", '<tool_call>{"name":"look",  "arguments":{"at":  1}}</tool_call>', "Not far.</think> Here.", ""],
)
def test_the_next_prompt_begins_with_the_tokens_of_the_last_answer(template, written):
    chats = conversations(template)
    prompt = chats.prompt(ASK, TOOLS)
    output = chats.tokenizer.encode(written).tolist()
    content, calls = TOOLS.calls(written)
    answer = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
    chats.note(prompt, output, answer)
    sent = json.loads(json.dumps(answer))
    (sent,) = messages_of({"messages": [sent]})
    follow = {"role": "tool", "content": "At home."} if calls else {"role": "user", "content": "Where?"}
    later = chats.prompt([*ASK, sent, follow], TOOLS)
    known = [*prompt.tokens.tolist(), *output]
    assert later.tokens[: len(known)].tolist() == known
    rest = chats.tokenizer.decode(later.tokens[len(known) :])
    assert follow["content"] in rest
    assert "look" not in rest


def test_what_only_begins_like_an_answer_has_its_own_tokens():
    """Here a token that is no text, and half a character."""
    chats = conversations()
    prompt = chats.prompt(ASK)
    expected = prompt.tokens.tolist()
    output = [4, *chats.tokenizer.encode("é").tolist()[:1]]
    chats.note(prompt, output, {"role": "assistant", "content": chats.tokenizer.decode(output)})
    chats.note(prompt, [4], {"role": "assistant", "content": ""})
    assert chats.prompt(ASK).tokens.tolist() == expected


def test_templates_describe_the_tools_themselves_if_they_can():
    assert conversations(WITH_CALLS).prompt(ASK, TOOLS).text.startswith('<|system|>[{"type": "function"')
    text = conversations().prompt(ASK, TOOLS).text
    assert text.startswith("<|system|>Be kind to llamas.\n\nYou can call these functions:")


def test_evicting_caches_keep_the_end_of_the_system_prompt():
    prompt = conversations(evicts=True).prompt(ASK)
    (n,) = prompt.checkpoints
    chats = conversations(evicts=True)
    another = chats.prompt([ASK[0], {"role": "user", "content": "And now?"}])
    assert another.checkpoints == (n,)
    assert another.tokens[:n].tolist() == prompt.tokens[:n].tolist()
    assert chats.tokenizer.decode(prompt.tokens[:n]) == "Be kind to llamas."
    assert conversations().prompt(ASK).checkpoints == ()
