"""Files of prompts: what is read, what is refused, and what is written."""

import json

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.engine.sampling import Sampling
from litgpt.generate.prompts_file import read_prompts
from litgpt.prompts import ChatTemplate

BASE = Sampling(0.8, 50, seed=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    LLM(tiny_gpt(block_size=256, **VOCABULARY), Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)).save(
        folder / "tiny"
    )
    return folder / "tiny"


def generate(folder, *options):
    return main(["generate", str(folder), "--precision", "32-true", "--max_new_tokens", "12", *map(str, options)])


def test_lines_of_text_are_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('one\n\n  two words \r\n{"prompt": "not JSON here"}\n', "utf-8")
    lines = read_prompts(path, 7, BASE, "Be brief.")
    assert [(line.number, line.prompt) for line in lines] == [
        (1, "one"),
        (3, "  two words "),
        (4, '{"prompt": "not JSON here"}'),
    ]
    assert [line.sampling.seed for line in lines] == [100, 101, 102]
    assert {(line.max_new_tokens, line.sys_prompt, line.id) for line in lines} == {(7, "Be brief.", None)}


def test_objects_have_settings_of_their_own(tmp_path):
    path = tmp_path / "prompts.jsonl"
    objects = [
        {"prompt": "a\u2028b", "id": {"x": 1}},
        {"prompt": "c", "sys_prompt": "S", "max_new_tokens": 3, "seed": 5, "min_p": 0.1, "logit_bias": {"4": -9}},
    ]
    path.write_text("\ufeff" + "\n".join(json.dumps(x, ensure_ascii=False) for x in objects), "utf-8")
    first, second = read_prompts(path, 7, BASE)
    assert (first.prompt, first.id, first.sampling) == ("a\u2028b", {"x": 1}, BASE)
    assert (second.sys_prompt, second.max_new_tokens) == ("S", 3)
    assert second.sampling == Sampling(0.8, 50, min_p=0.1, logit_bias={4: -9}, seed=5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON.*column"),
        ("[1]", 'object with a "prompt"'),
        ('{"text": "a"}', "unknown key 'text'"),
        ('{"sys_prompt": "a"}', '"prompt" is missing'),
        ('{"prompt": ""}', '"prompt" is missing or empty'),
        ('{"prompt": "a", "sys_prompt": 3}', '"sys_prompt" is not a text: 3'),
        ('{"prompt": "a", "max_new_tokens": 0}', '"max_new_tokens" must be at least 1'),
        ('{"prompt": "a", "max_new_tokens": 2.5}', '"max_new_tokens" is not a whole number: 2.5'),
        ('{"prompt": "a", "temperature": "hot"}', "\"temperature\" is not a number: 'hot'"),
        ('{"prompt": "a", "top_k": true}', '"top_k" is not a whole number: True'),
        ('{"prompt": "a", "top_p": 3}', "top_p must be in 0..1.*3"),
        ('{"prompt": "a", "logit_bias": [3]}', '"logit_bias" is not an object'),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "'x'"),
        ('{"prompt": "a", "logit_bias": {"1": "much"}}', "logit_bias.*much"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_before_any_work(tmp_path, line, message, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"prompts.jsonl, line 3: .*{message}"):
        read_prompts(path, 7, BASE)
    assert main(["generate", "no/such/model", "--prompts", str(path)]) != 0  # the model was not even looked for
    error = capsys.readouterr().err
    assert "line 3" in error
    assert error.count("\n") == 1


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.txt", 7, BASE)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt has no prompts"):
        read_prompts(tmp_path / "empty.txt", 7, BASE)
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(ValueError, match="latin.txt, line 2: not text in UTF-8.*byte 4"):
        read_prompts(tmp_path / "latin.txt", 7, BASE)


def test_answers_do_not_depend_on_what_is_generated_beside_them(folder, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    counts = [12, 1, 7, 3, 20, 2, 5]
    objects = [{"prompt": "p" * (3 * i + 1), "max_new_tokens": n, "id": i} for i, n in enumerate(counts)]
    path.write_text("\n".join(map(json.dumps, objects)))
    printed = []
    for batch_size in (1, 3, 8):
        assert generate(folder, "--prompts", path, "--batch_size", batch_size) == 0
        out, err = capsys.readouterr()
        printed.append(out)
        assert f"7 answers, {sum(counts)} tokens" in err
        assert f"{min(batch_size, 7)} at a time" in err
    assert printed[0] == printed[1] == printed[2]
    records = [json.loads(line) for line in printed[0].splitlines()]
    assert [(r["line"], r["id"], r["prompt"]) for r in records] == [(i + 1, i, "p" * (3 * i + 1)) for i in range(7)]
    assert [r["new_tokens"] for r in records] == counts
    assert {r["finish_reason"] for r in records} == {"length"}
    llm = LLM.load(folder, precision="32-true")
    for i, record in enumerate(records):
        answer = llm.generate(record["prompt"], max_new_tokens=counts[i], temperature=0.8, top_k=50, seed=1234 + i)
        assert record["answer"] == answer


def test_answers_go_to_a_file_that_is_complete_or_not_there(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    out = tmp_path / "answers.jsonl"
    assert generate(folder, "--prompts", tmp_path / "p.txt", "--out", out, "--num_samples", 2, "--logprobs", 2) == 0
    assert capsys.readouterr().out == ""
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(r["line"], r["sample"]) for r in records] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(len(r["logprobs"]) == r["new_tokens"] for r in records)
    assert records[0]["answer"] != records[1]["answer"]
    before = out.read_bytes()

    def fail(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("litgpt.generate.prompts_file.Answer.of", fail)
    assert generate(folder, "--prompts", tmp_path / "p.txt", "--out", out) == 1
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "p.txt"]


def test_a_prompt_that_does_not_fit_is_named_before_any_answer(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text(f"one\n{'long ' * 60}\n")
    assert generate(folder, "--prompts", tmp_path / "p.txt") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "line 2: prompt and new tokens come to" in err


def test_one_prompt_as_json_and_options_that_clash(folder, tmp_path, capsys):
    assert generate(folder, "--prompt", "hi", "--logprobs", 1, "--temperature", 0) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == "hi"
    assert "line" not in record
    (tmp_path / "p.txt").write_text("one\n")
    for options, message in (
        (("--prompts", tmp_path / "p.txt", "--prompt", "x"), "give one of them"),
        (("--prompts", tmp_path / "p.txt", "--batch_size", 0), "batch_size"),
        (("--prompts", tmp_path / "p.txt", "--out", tmp_path / "no" / "x"), "no folder"),
        (("--logprobs", -1), "logprobs"),
        (("--min_p", 2), "min_p"),
        (("--repetition_penalty", 0), "repetition_penalty"),
    ):
        assert generate(folder, *options) == 1
        assert message in capsys.readouterr().err
