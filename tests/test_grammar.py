"""The example of answers that follow a grammar; skipped where `outlines-core` is not installed."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.prompts import ChatTemplate

pytest.importorskip("outlines_core", reason="pip install '.[grammar]'")
FOLDER = Path(__file__).parents[1] / "extensions" / "grammar"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["llama", "alpaca"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "age"],
}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("constrained")


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = LLM(tiny_gpt(**VOCABULARY), Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer))
    model.distribute(precision="32-true")
    return model


def test_answers_of_a_batch_follow_the_schema_each_on_its_own(llm, example):
    processor = example.Constrained(example.build_regex_from_schema(json.dumps(SCHEMA)), llm.tokenizer)
    settings = {"max_new_tokens": 80, "temperature": 5.0, "logits_processors": [processor], "logprobs": 0}
    answers = llm.generate(["Hello", "Hello", "Which?"] * 4, seed=1, **settings)
    found = [json.loads(answer.text) for answer in answers]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert all(thing["kind"] in ("llama", "alpaca") and type(thing["age"]) is int for thing in found)
    assert len({answer.text for answer in answers}) > 4
    alone = llm.generate("Which?", seed=3, **settings)
    assert alone.text == answers[2].text


def test_characters_of_several_tokens_are_followed(llm, example):
    processor = example.Constrained("(ä|€|😀){3}", llm.tokenizer)  # a token is a byte here
    for seed in range(5):
        text = llm.generate("Hello", max_new_tokens=20, seed=seed, temperature=3.0, logits_processors=[processor])
        assert re.fullmatch("[ä€😀]{3}", text)
