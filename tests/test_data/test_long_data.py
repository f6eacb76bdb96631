"""Data of long texts: tasks made at random, and files of LongBench v2 and HELMET."""

import json

import pytest
import torch
from tiny import tiny_tokenizer

from litgpt.data import LongTexts, Retrieval
from litgpt.data.long_texts import CUT

LONGBENCH = {
    "_id": "1",
    "domain": "Single-Document QA",
    "context": "Mary went to the harbour. " * 3,
    "question": "Where did Mary go?",
    "choice_A": "home",
    "choice_B": "to the harbour",
    "choice_C": "to sea",
    "choice_D": "nowhere",
    "answer": "B",
}
HELMET = [
    {
        "question": "Who sang?",
        "answers": ["Ann", "Anna"],
        "ctxs": [{"title": "Song", "text": "Ann sang."}, {"text": "Bo ran."}],
    },
    {"context": '{"k1": "v1", "k2": "v2"}', "question": "k2", "answer": "v2"},
    {"index": 0, "input": "The number of sea is 7. What is it?", "outputs": ["7"], "length": 9},
]


def ready(module, max_seq_length=None):
    module.connect(tiny_tokenizer(), 1, max_seq_length)
    module.setup()
    return module


def answer(sample):
    ids = sample["labels"]
    return tiny_tokenizer().decode(ids[ids >= 0])


def test_samples_of_every_task_are_as_long_as_they_may_be_and_end_with_what_is_learned():
    tasks = "retrieval,niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe"
    module = ready(Retrieval(tasks=tasks, train_samples=7, val_samples=7), 1500)
    assert len(module.train_dataset) == len(module.test_dataset) == 7
    for dataset in (module.train_dataset, module.test_dataset):
        for sample in map(dataset.__getitem__, range(7)):
            assert 1000 < len(sample["input_ids"]) <= 1500
            assert "is" in answer(sample) or "are" in answer(sample)
    again = ready(Retrieval(tasks=tasks, train_samples=7, val_samples=7), 1500)
    assert torch.equal(again.train_dataset[3]["input_ids"], module.train_dataset[3]["input_ids"])
    other = ready(Retrieval(tasks=tasks, train_samples=7, val_samples=7, seed=1), 1500)
    assert not torch.equal(other.train_dataset[3]["input_ids"], module.train_dataset[3]["input_ids"])


def test_an_answer_stands_in_its_text():
    module = ready(Retrieval(tasks="niah_single_1", train_samples=1, val_samples=0, length=700))
    text = module.train_dataset.sample(0)["messages"]
    number = text[1]["content"].split()[-1]
    assert text[1]["content"].startswith("The secret number of")
    assert number in text[0]["content"]


def test_texts_have_up_to_so_many_numbers_all_asked_for():
    module = ready(Retrieval(tasks="retrieval", train_samples=12, val_samples=0, length=3000, numbers=4))
    found = [module.train_dataset.sample(i)["messages"] for i in range(12)]
    assert {len(messages) // 2 for messages in found} == {2, 3, 4}
    for text, *rest in found:
        assert all(message["content"].split()[-1] in text["content"] for message in rest[::2])


@pytest.mark.parametrize(
    ("arguments", "limit", "words"),
    [
        ({"numbers": 1}, 100, "numbers must be at least 2, got 1"),
        ({"tasks": "chess"}, 100, "no task is called 'chess'"),
        ({"tasks": ""}, 100, "no task is called ''"),
        ({"train_samples": 0}, 100, "train_samples must be at least 1, got 0"),
        ({"length": 200}, 100, "length 200 is more than the 100 tokens"),
        ({}, None, "nothing says how long the samples are"),
        ({}, 50, "too short for the task"),
    ],
)
def test_impossible_retrieval_data_is_refused(arguments, limit, words):
    with pytest.raises(ValueError, match=words):
        ready(Retrieval(**arguments), limit)


def test_records_of_longbench_and_helmet_become_samples(tmp_path):
    (tmp_path / "longbench.json").write_text(json.dumps([LONGBENCH]))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "helmet.jsonl").write_text("".join(json.dumps(record) + "\n" for record in HELMET))
    module = ready(LongTexts(path=tmp_path, val_split_fraction=0))
    said = [(module.train_dataset.sample(i)["instruction"], answer(module.train_dataset[i])) for i in range(4)]
    choices = "(A) home\n(B) to the harbour\n(C) to sea\n(D) nowhere"
    assert said[0] == (f"{LONGBENCH['context']}\n\nWhere did Mary go?\n{choices}\nWhich choice is right?", "(B)")
    assert said[1] == ("Song\nAnn sang.\n\nBo ran.\n\nWho sang?", "Ann")
    assert said[2] == ('{"k1": "v1", "k2": "v2"}\n\nk2', "v2")
    assert said[3] == ("The number of sea is 7. What is it?", "7")


def test_a_text_that_is_too_long_loses_its_middle_and_never_its_question(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"context": "begin " + "x" * 5000 + " end", "question": "Why?", "answer": "So."}]))
    module = ready(LongTexts(path=path, val_split_fraction=0), 300)
    text, sample = module.train_dataset.sample(0)["instruction"], module.train_dataset[0]
    assert text.startswith("begin xxx")
    assert CUT in text
    assert text.endswith("xxx end\n\nWhy?")
    assert 280 < len(sample["input_ids"]) <= 300
    assert answer(sample) == "So."


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"context": "x", "question": "y"}, " lacks 'answer'"),
        ({"question": "y", "answer": "z"}, " lacks 'context'"),
        ({"context": "x", "question": "y", "answers": []}, r": answers = \[\] must hold a text"),
        ({"context": "x", "question": "y", "answers": ["z", 1]}, ": answers = .* must be a text or a list"),
        ({**LONGBENCH, "answer": "E"}, ": answer = 'E' is not supported for choices, only 'A' or 'B' or 'C' or 'D'"),
        ({"question": "y", "answers": ["z"], "ctxs": "no list"}, ": ctxs = 'no list' must be a list"),
        ({"question": "y", "answers": ["z"], "ctxs": [{"title": "t"}]}, ": ctxs lacks 'text'"),
        ([1], ": a record is a mapping, got list"),
    ],
)
def test_other_records_are_refused_with_their_place(tmp_path, record, words):
    path = tmp_path / "some.jsonl"
    path.write_text(f"{json.dumps(LONGBENCH)}\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=f"some.jsonl, line 2{words}"):
        ready(LongTexts(path=path))
