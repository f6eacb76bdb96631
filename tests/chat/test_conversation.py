import pytest
import torch
from tiny import CHAT_TEMPLATE, VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.chat.conversation import Conversation
from litgpt.engine.loading import Ready
from litgpt.engine.session import Session
from litgpt.prompts import ChatTemplate, PromptStyle


@pytest.fixture
def talk():
    def make(kv_cache="dense", cache_length=None, block_size=512, style=None, max_new_tokens=6):
        model = tiny_gpt(**VOCABULARY, block_size=block_size)
        tokenizer = tiny_tokenizer()
        ready = Ready(model, tokenizer, style or ChatTemplate(CHAT_TEMPLATE), None)
        notes = []
        new_session = lambda: Session(model, kv_cache, cache_length)  # noqa: E731
        conversation = Conversation(ready, new_session, max_new_tokens, {"temperature": 0.0}, notify=notes.append)
        return conversation, notes

    return make


def tokens_of(conversation):
    """The conversation so far, the last answer included."""
    return list(conversation._history.tokens)


def fresh_answer(conversation, tokens):
    """What the model says after these tokens, without caches."""
    out = greedy_without_caches(conversation.ready.model, torch.tensor(tokens), conversation.max_new_tokens).tolist()
    return out[: out.index(0)] if 0 in out else out


@pytest.mark.parametrize("style", [None, "chatml", "alpaca", "default"])
def test_every_turn_answers_the_whole_conversation_and_computes_only_what_is_new(talk, style):
    conversation, notes = talk(style=style and PromptStyle.from_name(style))
    previous = 0
    for text in ("Hello", "Über 東京", "And?"):
        list(conversation.ask(text))
        prompt = tokens_of(conversation)[: conversation.prompt_tokens]
        assert tokens_of(conversation)[conversation.prompt_tokens :] == fresh_answer(conversation, prompt)
        assert conversation.session.reused >= previous
        previous = conversation.prompt_tokens
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 3
    assert not notes


def test_a_full_context_drops_the_oldest_turns_and_says_so(talk):
    conversation, notes = talk(block_size=100)
    for i in range(8):
        list(conversation.ask(f"message {i}"))
        assert conversation.prompt_tokens + conversation.max_new_tokens <= 100
    assert notes
    assert "100 tokens is full" in notes[0]
    assert [m["content"] for m in conversation.messages[::2]] == [f"message {i}" for i in range(8)]  # none is lost


def test_an_evicting_cache_goes_on_and_on(talk):
    conversation, notes = talk("lastrec", cache_length=32, block_size=100)
    for i in range(12):
        list(conversation.ask(f"message {i}"))
    assert not notes
    assert conversation.prompt_tokens > 200
    assert conversation.session.reused > 150


def test_a_message_that_is_too_long_is_as_if_it_was_not_said(talk):
    conversation, _ = talk(block_size=64)
    list(conversation.ask("short"))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"103 tokens.*up to 6.*64"):
        list(conversation.ask("x" * 100))
    assert conversation.messages == before
    list(conversation.ask("again"))
    assert conversation.messages[-2]["content"] == "again"


def test_an_answer_left_early_stays_as_it_is(talk):
    conversation, _ = talk()
    pieces = conversation.ask("Hello")
    said = next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    list(conversation.ask("And?"))
    prompt = tokens_of(conversation)[: conversation.prompt_tokens]
    assert tokens_of(conversation)[conversation.prompt_tokens :] == fresh_answer(conversation, prompt)


def test_reset_forgets(talk):
    conversation, _ = talk()
    first = list(conversation.ask("Hello"))
    list(conversation.ask("And?"))
    conversation.reset()
    assert list(conversation.ask("Hello")) == first
    assert conversation.session.reused == 0


def test_an_answer_may_be_as_long_as_the_context(talk):
    conversation, _ = talk(block_size=100, max_new_tokens=1000)
    for message in ("Hello", "And?"):
        list(conversation.ask(message))
        assert conversation.prompt_tokens + conversation.answer_limit == 100
    with pytest.raises(ValueError, match=r"91 tokens.*100"):
        list(conversation.ask("x" * 88))


def test_an_error_before_the_answer_changes_nothing(talk):
    conversation, _ = talk()
    list(conversation.ask("Hello"))
    before, tokens = conversation.messages, tokens_of(conversation)
    conversation.sampling = {"temperature": 0.0, "logit_bias": {10**6: 1.0}}
    with pytest.raises(ValueError, match="logit_bias"):
        list(conversation.ask("And?"))
    assert (conversation.messages, tokens_of(conversation)) == (before, tokens)
    conversation.sampling = {"temperature": 0.0}
    list(conversation.ask("So?"))
    prompt = tokens_of(conversation)[: conversation.prompt_tokens]
    assert tokens_of(conversation)[conversation.prompt_tokens :] == fresh_answer(conversation, prompt)


def test_long_prompts_enter_in_pieces_where_that_changes_nothing(talk):
    for kind, length, pieces in (("dense", None, 3), ("lastrec", 64, 1)):
        conversation, _ = talk(kind, length, block_size=2048)
        calls, forward = [], conversation.ready.model.forward
        conversation.ready.model.forward = lambda idx, *args, f=forward, c=calls, **kw: (
            c.append(idx.shape[1]),
            f(idx, *args, **kw),
        )[1]
        list(conversation.ask("x" * 1100))
        assert sum(size > 1 for size in calls) == pieces
