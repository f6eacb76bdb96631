"""Samples as tokens: exact masks under real chat templates, and a cache that knows when it is stale."""

import logging
import multiprocessing
import sys

import numpy as np
import pytest
import tokenizers
import torch
from tiny import CHATML, tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from litgpt.chat_template import ChatTemplate
from litgpt.data import encoding
from litgpt.data.base import SFTDataset
from litgpt.data.encoding import EncodedSamples
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (  # answers that more messages follow lose their thoughts, as in DeepSeek R1 and Qwen3
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' %}"
    "{% if not loop.last and '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# template, BOS, ends of texts, and what an answer ends with
TEMPLATES = {
    "chatml": (CHATML, None, ["<|im_end|>"], "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", ["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": (GEMMA, "<bos>", ["<eos>", "<end_of_turn>"], "<end_of_turn>"),
    "gemma without generation_config": (GEMMA, "<bos>", ["<eos>"], "<end_of_turn>"),
    "mistral": (MISTRAL, "<s>", ["</s>"], "</s>"),
    "phi3": (PHI3, "<s>", ["<|endoftext|>", "<|end|>"], "<|end|>"),
    "thinking": (THINKING, None, ["<|im_end|>"], "<|im_end|>"),
}
OTHERS = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>"]
TALK = [
    {"role": "user", "content": "Hi, how are you?"},
    {"role": "assistant", "content": "Fine.\n\nAnd you?"},
    {"role": "user", "content": "Fine.\n\nAnd you?"},
    {"role": "assistant", "content": "I said: fine."},
]


def tokenizer_of(template: str, bos: str | None, ends: list[str], merge: bool = True) -> Tokenizer:
    """A byte-level tokenizer with a few merges and the special tokens of a template."""
    specials = list(dict.fromkeys([*([bos] if bos else []), *ends, *OTHERS]))
    pairs = [("Ċ", "Ċ"), ("e", "."), ("i", "n"), ("Ġ", "I")] if merge else []
    alphabet = sorted(ByteLevel.alphabet()) + [a + b for a, b in pairs]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    processor = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    processor.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    processor.decoder = tokenizers.decoders.ByteLevel()
    processor.add_special_tokens(specials)
    ids = [vocab[end] for end in ends]
    return Tokenizer.from_tokenizers(
        processor,
        bos_id=vocab[bos] if bos else None,
        eos_id=ids[0],
        eos_ids=ids,
        use_bos=bos is not None,
        chat_template=template,
    )


def encode_sample(sample, tokenizer, style):
    return EncodedSamples.of([sample], tokenizer, style, "test")[0]


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.processor.decode(ids.tolist(), skip_special_tokens=False)


def spans(counted: np.ndarray) -> list[slice]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], counted.astype(int), [0]))))
    return [slice(begin, end) for begin, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize("places", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_the_templates_own_and_answers_with_their_ends_are_counted(name, places, monkeypatch):
    template, bos, ends, end = TEMPLATES[name]
    tokenizer = tokenizer_of(template, bos, ends)
    if not places:  # as SentencePiece
        monkeypatch.setattr(tokenizer, "backend", "sentencepiece")
    style = ChatTemplate.from_tokenizer(tokenizer)
    found = encode_sample({"messages": TALK}, tokenizer, style)
    special = {"bos_token": bos, "eos_token": ends[0]}
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer.processor, **{k: v for k, v in special.items() if v})
    expected = reference.apply_chat_template(TALK, chat_template=template, tokenize=True, return_dict=False)
    assert found.ids.tolist() == expected
    learned = [text_of(tokenizer, found.ids[span]) for span in spans(found.counted)]
    answers = [message["content"] + end for message in TALK if message["role"] == "assistant"]
    assert [text.removeprefix(" ") for text in learned] == answers


def test_a_template_that_rewrites_answers_gives_a_sample_for_each():
    tokenizer = tokenizer_of(*TEMPLATES["thinking"][:3])
    style = ChatTemplate.from_tokenizer(tokenizer)
    talk = [dict(message) for message in TALK]
    talk[1]["content"] = "<think>Who is it?</think>\nFine."
    dataset = SFTDataset([{"messages": TALK}, {"messages": talk}], tokenizer, style)
    assert len(dataset) == 3
    rows = list(dataset.encodings)
    learned = [[text_of(tokenizer, row.ids[span]) for span in spans(row.counted)] for row in rows]
    assert learned[1:] == [["<think>Who is it?</think>\nFine.<|im_end|>"], ["I said: fine.<|im_end|>"]]
    assert "Who is it?" not in text_of(tokenizer, rows[2].ids)
    assert dataset.example(2)[0] == TALK[2]["content"]


def test_an_opening_of_answers_that_the_template_leaves_out_afterwards_is_not_learned():
    template = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert template != THINKING
    tokenizer = tokenizer_of(template, None, ["<|im_end|>"])
    found = encode_sample({"messages": TALK[:2]}, tokenizer, ChatTemplate.from_tokenizer(tokenizer))
    assert [text_of(tokenizer, found.ids[span]) for span in spans(found.counted)] == ["Fine.\n\nAnd you?<|im_end|>"]


@pytest.mark.parametrize("style", ["template", "alpaca"])
def test_a_greeting_is_read_and_not_learned(style):
    tokenizer = tokenizer_of(*TEMPLATES["chatml"][:3])
    style = ChatTemplate.from_tokenizer(tokenizer) if style == "template" else PromptStyle.from_name(style)
    talk = [{"role": "assistant", "content": "Welcome."}, *TALK[:2]]
    found = encode_sample({"messages": talk}, tokenizer, style)
    assert [text_of(tokenizer, found.ids[span]) for span in spans(found.counted)] == ["Fine.\n\nAnd you?<|im_end|>"]
    assert "Welcome." in text_of(tokenizer, found.ids)
    with pytest.raises(ValueError, match="no answer of the assistant"):
        encode_sample({"messages": talk[:1]}, tokenizer, style)


def test_fields_of_a_conversation_beside_its_messages_do_not_decide_what_is_learned():
    tokenizer = tokenizer_of(*TEMPLATES["chatml"][:3])
    style = ChatTemplate.from_tokenizer(tokenizer)
    plain, more = (encode_sample({"messages": TALK, **own}, tokenizer, style) for own in ({}, {"learn": "last"}))
    assert np.array_equal(more.ids, plain.ids)
    assert np.array_equal(more.counted, plain.counted)


def test_the_prompt_is_what_the_model_sees_when_it_answers():
    for name, (template, bos, ends, _) in TEMPLATES.items():
        tokenizer = tokenizer_of(template, bos, ends)
        style = ChatTemplate.from_tokenizer(tokenizer)
        found = encode_sample({"messages": TALK}, tokenizer, style)
        prompt = tokenizer.encode(style.render(TALK[:3]), bos=False).tolist()
        assert found.ids[: spans(found.counted)[-1].start].tolist() == prompt, name


def test_an_answer_that_holds_the_end_token_is_learned_to_its_own_end():
    tokenizer = tokenizer_of(*TEMPLATES["chatml"][:3])
    talk = [TALK[0], {"role": "assistant", "content": "It ends with <|im_end|>, see?"}]
    found = encode_sample({"messages": talk}, tokenizer, ChatTemplate.from_tokenizer(tokenizer))
    (span,) = spans(found.counted)
    assert text_of(tokenizer, found.ids[span]) == "It ends with <|im_end|>, see?<|im_end|>"


def test_styles_without_messages_encode_answers_apart_and_end_each():
    tokenizer = tiny_tokenizer()
    found = encode_sample({"messages": TALK}, tokenizer, PromptStyle.from_name("alpaca"))
    learned = [text_of(tokenizer, found.ids[span]) for span in spans(found.counted)]
    assert learned == ["Fine.\n\nAnd you?<|end|>", "I said: fine.<|end|>"]


def test_an_input_that_the_style_has_no_place_for_is_not_lost():
    tokenizer = tiny_tokenizer()
    sample = {"instruction": "Add.", "input": "2+2", "output": "4"}
    for style in (ChatTemplate.from_tokenizer(tokenizer), PromptStyle.from_name("default")):
        assert "Add.\n\n2+2" in text_of(tokenizer, encode_sample(sample, tokenizer, style).ids)
    alpaca = text_of(tokenizer, encode_sample(sample, tokenizer, PromptStyle.from_name("alpaca")).ids)
    assert alpaca.count("2+2") == 1


SAMPLES = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(10)]


def encoded(samples=SAMPLES, tokenizer=None, style="alpaca"):
    style = PromptStyle.from_name(style) if isinstance(style, str) else style
    return EncodedSamples.of(samples, tokenizer or tiny_tokenizer(), style, "test")


def test_samples_are_encoded_once(own_cache, monkeypatch):
    first = encoded()
    assert len(list(own_cache.glob("*.safetensors"))) == 1
    monkeypatch.setattr(encoding, "_encode", None)
    again = encoded()
    assert all(np.array_equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))


class Style(PromptStyle):
    ending = ":"

    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return prompt + self.ending


@pytest.mark.parametrize(
    "change",
    [
        {"samples": SAMPLES[:-1]},
        {"samples": [*SAMPLES[:-1], {"instruction": "Say 9.", "output": "10"}]},
        {"tokenizer": tokenizer_of(CHATML, None, ["<|im_end|>"])},
        {"style": "default"},
    ],
)
def test_what_changes_the_tokens_makes_the_cache_stale(change, own_cache):
    encoded()
    encoded(**change)
    assert len(list(own_cache.glob("*.safetensors"))) == 2


def test_a_style_of_ones_own_may_change_at_any_time(own_cache):
    before = encoded(style=Style())[0].ids
    Style.ending = "?"
    assert not np.array_equal(encoded(style=Style())[0].ids, before)


def test_a_broken_cache_file_is_made_anew(own_cache):
    expected = encoded()[3]
    (file,) = own_cache.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(encoded()[3].ids, expected.ids)
    assert np.array_equal(encoded()[3].ids, expected.ids)


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(encoded()) == 10


def _encode_in_process(barrier):
    barrier.wait()
    assert len(encoded()) == 10


def test_processes_encode_side_by_side(own_cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_encode_in_process, args=(barrier,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
        assert worker.exitcode == 0
    assert [file.suffix for file in own_cache.iterdir()] == [".safetensors"]


def test_a_sample_that_the_template_rejects_is_named():
    tokenizer = tokenizer_of(*TEMPLATES["gemma"][:3])
    bad = [{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}]
    with pytest.raises(ValueError, match="sample 1: .*System role not supported"):
        encoded([{"messages": TALK}, *bad], tokenizer, ChatTemplate.from_tokenizer(tokenizer))


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_limit_cuts_samples_and_a_mask_hides_prompts_whatever_is_in_the_cache(mask_prompt, own_cache):
    tokenizer = tiny_tokenizer()
    whole = SFTDataset(SAMPLES, tokenizer, "alpaca", mask_prompt=mask_prompt)
    cut = SFTDataset(SAMPLES, tokenizer, "alpaca", max_seq_length=whole.lengths[0] - 1, mask_prompt=mask_prompt)
    assert cut.lengths == [len(item["input_ids"]) for item in cut] == [whole.lengths[0] - 1] * 10
    for ours, full in zip(cut, whole, strict=True):
        assert torch.equal(ours["input_ids"], full["input_ids"][:-1])
        assert torch.equal(ours["labels"], full["labels"][:-1])
        assert (full["labels"] == -100).any() == mask_prompt
    assert len(list(own_cache.glob("*.safetensors"))) == 1


def test_samples_without_a_token_to_learn_are_reported(caplog):
    def check(samples, limit, mask_prompt=True):
        SFTDataset(samples, tiny_tokenizer(), "alpaca", limit, mask_prompt).check_learned()

    samples = [*SAMPLES, {"instruction": "x" * 300, "output": "y"}]
    with caplog.at_level(logging.WARNING, "litgpt"):
        check(samples, 200)
    assert "1 of 11 samples have no token to be learned within 200 tokens" in caplog.text
    with pytest.raises(ValueError, match="no sample has a token to be learned"):
        check(SAMPLES, 4)
    with pytest.raises(ValueError, match="no sample has a token to be learned"):
        check(SAMPLES, 1, mask_prompt=False)  # there is nothing before the first token to learn it from
    with pytest.raises(ValueError, match="there are no samples"):
        encoded([])


def test_no_function_is_called_for_every_token(own_cache):
    samples, calls = [{"instruction": "Say it again. " * 10, "output": "It again. " * 20}] * 100, []
    sys.setprofile(lambda frame, event, value: calls.append(event))
    try:
        found = encoded(samples)
    finally:
        sys.setprofile(None)
    assert len(calls) < sum(found.lengths)


def test_one_by_one_equals_all_at_once():
    tokenizer = tokenizer_of(*TEMPLATES["llama3"][:3])
    style = ChatTemplate.from_tokenizer(tokenizer)
    samples = [*SAMPLES, {"messages": TALK}]
    together = EncodedSamples.of(samples, tokenizer, style, "test")
    for sample, found in zip(samples, together, strict=True):
        alone = encode_sample(sample, tokenizer, style)
        assert np.array_equal(alone.ids, found.ids)
        assert np.array_equal(alone.counted, found.counted)
        assert alone.raw == found.raw
    item = SFTDataset(samples, tokenizer, style)[0]
    assert torch.equal(item["labels"][-1], item["input_ids"][-1])
