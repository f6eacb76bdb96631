"""Files of prompts: what is read, what is refused, and what is written."""

import importlib
import inspect
import json
import os
import re
import sys
import threading

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.engine.answer import Answer
from litgpt.engine.sampling import Sampling
from litgpt.generate import base
from litgpt.generate.prompts_file import PromptLine, read_prompts
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
        ('{"prompt": "a", "temperature": "hot"}', "\"temperature\" is not a finite number: 'hot'"),
        ('{"prompt": "a", "top_k": true}', '"top_k" is not a whole number: True'),
        ('{"prompt": "a", "top_p": 3}', "top_p must be in 0..1.*3"),
        ('{"prompt": "a", "logit_bias": [3]}', '"logit_bias" is not names with values'),
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"prompt": "a", "id": "\ud800"}', r'"id" has half of a surrogate pair at character 1: \\ud800'),
        (r'{"prompt": "a", "id": {"x": ["b", {"\udfff": 1}]}}', r'"id" has half of a surrogate pair'),
        (r'{"prompt": "a\udc00b"}', r'"prompt" has half of a surrogate pair at character 2'),
        (r'{"prompt": "a", "sys_prompt": "\udbff"}', '"sys_prompt" has half of a surrogate pair'),
        (f'{{"prompt": "a", "temperature": 1{"0" * 400}}}', '"temperature" is not a finite number: 1000'),
        (f'{{"prompt": "a", "logit_bias": {{"3": 1{"0" * 400}}}}}', r'"logit_bias"\[\'3\'\] is not a finite number'),
        (f'{{"prompt": "a", "seed": 1{"0" * 400}}}', '"seed" must be at most'),
        (f'{{"prompt": "a", "id": 1{"0" * 5000}}}', "a number of 5,001 digits is too long"),
        ('{"prompt": "a", "top_p": 1e999}', "'1e999' is not a finite number"),
        ('{"prompt": "a", "top_p": NaN}', "'NaN' is not a finite number"),
        ('{"prompt": "a", "id": -Infinity}', "'-Infinity' is not a finite number"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' occurs twice"),
        ('{"prompt": "a", "logit_bias": {"3": 1, "3": 2}}', "the key '3' occurs twice"),
        ('{"prompt": "a", "logit_bias": {"-3": 1}}', 'a key of "logit_bias" is not a whole number'),
        ('{"prompt": "a", "min_p": false}', '"min_p" is not a finite number: False'),
        ('{"prompt": "a", "id": ' + "[" * 200 + "]" * 200 + "}", '"id" has more than 100 levels of brackets'),
        ("[" * 100_000, "more than 100 levels of brackets"),
        ('{"prompt": "a", "repetition_penalty": [1]}', r'"repetition_penalty" is not a finite number: \[1\]'),
    ],
)
def test_values_that_mean_nothing_are_refused_by_line_and_field(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"prompts.jsonl, line 2: .*{message}"):
        read_prompts(path, 7, BASE)


def test_null_means_what_the_command_says(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "temperature": null, "top_k": null, "seed": null, "sys_prompt": null, "id": null}')
    assert read_prompts(path, 7, BASE, "S")[0] == PromptLine(1, "a", "S", 7, BASE)


def test_a_biased_token_that_does_not_exist_is_refused_before_any_answer(folder, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "logit_bias": {"261": 1}}')
    assert generate(folder, "--prompts", path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "line 2: logit_bias has the token 261, but the model's tokens are 0..260" in err


# --- --out


@pytest.fixture
def two_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    return tmp_path / "p.txt"


def fail_after(monkeypatch, count, error):
    """Let `count` answers come, and then an error."""
    real, calls = Answer.of, []

    def of(*args):
        calls.append(None)
        if len(calls) > count:
            raise error
        return real(*args)

    monkeypatch.setattr("litgpt.generate.prompts_file.Answer.of", of)


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("out of luck"), 1), (KeyboardInterrupt(), 130)])
def test_answers_before_a_failure_are_kept_beside_the_file(
    error, code, folder, two_prompts, tmp_path, capsys, monkeypatch
):
    (tmp_path / "x.jsonl").write_text("mine")
    (tmp_path / "x.jsonl.tmp").write_text("mine too")
    (tmp_path / "x.jsonl.partial").write_text("and mine")
    fail_after(monkeypatch, 1, error)
    out = tmp_path / "x.jsonl"
    assert generate(folder, "--prompts", two_prompts, "--out", out, "--batch_size", 1) == code
    assert f"1 complete answer kept in {out}.partial1\n" in capsys.readouterr().err
    (record,) = map(json.loads, (tmp_path / "x.jsonl.partial1").read_text().splitlines())
    assert record["prompt"] == "one"
    assert [(tmp_path / f"x.jsonl{end}").read_text() for end in ("", ".tmp", ".partial")] == [
        "mine",
        "mine too",
        "and mine",
    ]
    assert len(list(tmp_path.iterdir())) == 5


def test_links_are_followed(folder, two_prompts, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "answers.jsonl")
    for _ in range(2):  # the file that it names is made, and replaced
        assert generate(folder, "--prompts", two_prompts, "--out", tmp_path / "link.jsonl") == 0
        assert (tmp_path / "link.jsonl").is_symlink()
        assert len((tmp_path / "real" / "answers.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_written_through(folder, two_prompts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert generate(folder, "--prompts", two_prompts, "--out", tmp_path / "pipe") == 0
    reader.join(60)
    assert len(received[0].splitlines()) == 2
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_one_line(folder, two_prompts, capsys):
    assert generate(folder, "--prompts", two_prompts, "--out", "/dev/full") == 1
    assert capsys.readouterr().err.endswith("litgpt: error: No space left on device: '/dev/full'\n")
    assert not os.path.isfile("/dev/full")


@pytest.mark.parametrize("out", [".", "no/such/folder/x", "x" * 300, "p.txt", "loop"])
def test_where_nothing_can_be_written_is_said_before_the_model_is_looked_for(
    out, two_prompts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert main(["generate", "no/such/model", "--prompts", str(two_prompts), f"--out={out}"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no/such/model" not in err


def test_an_empty_path_is_refused(two_prompts, capsys):
    assert main(["generate", "no/such/model", "--prompts", str(two_prompts), "--out="]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--out" in err


def test_one_answer_is_one(folder, tmp_path, capsys):
    assert generate(folder, "--prompt", "a", "--logprobs", 0, "--max_new_tokens", 1) == 0
    assert "1 answer, 1 token in" in capsys.readouterr().err


# --- the same options everywhere


def test_commands_that_generate_have_the_same_options():
    names = {
        command: set(inspect.signature(importlib.import_module(f"litgpt.{module}").main).parameters)
        for command, module in {
            "generate": "generate.base",
            "full": "generate.full",
            "lora": "generate.lora",
            "adapter": "generate.adapter",
            "adapter_v2": "generate.adapter_v2",
            "speculatively": "generate.speculative_decoding",
            "sequentially": "generate.sequentially",
            "tp": "generate.tp",
            "chat": "chat.base",
        }.items()
    }
    every = names.pop("generate")
    of_one_model = {"checkpoint_dir", "prompt_lookup"}
    of_answers = {"prompt", "prompts", "out", "batch_size", "num_samples", "logprobs"}
    assert every - names.pop("chat") == of_answers
    assert every - names.pop("speculatively") == of_one_model
    assert all(every <= others for others in names.values())


@pytest.mark.parametrize("value", [True, "7", 2.5, None, 0, -3])
def test_an_option_of_the_wrong_kind_is_named(value):
    with pytest.raises(ValueError, match="max_new_tokens (is not a whole number|must be at least 1)"):
        base.main("no/such/model", max_new_tokens=value)


POLICY = """
from dataclasses import dataclass
from litgpt.kvcache.policies.lastrec import LastRecentPolicy

@dataclass(frozen=True)
class MyPolicy(LastRecentPolicy):
    pass
"""


def test_arguments_of_caches_reach_them_and_unknown_ones_are_refused_by_name(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "users_policy.py").write_text(POLICY)
    (tmp_path / "options.yaml").write_text("kv_cache: lastrec\ncache_length: 8\nkv_cache_args:\n  n_sink: 2\n")
    answers = []
    evicting = ("--kv_cache", "lastrec", "--cache_length", 8)
    for options in (
        (*evicting, "--kv_cache_args.n_sink", 2),
        (*evicting, "--kv_cache_args", "{n_sink: 2}"),
        ("--config", tmp_path / "options.yaml"),
        ("--kv_cache", "users_policy:MyPolicy", "--cache_length", 8, "--kv_cache_args.n_sink", 2),
        evicting,
    ):
        assert generate(folder, "--prompt", "a long question", "--temperature", 0, *options) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] == answers[3] != answers[4]
    for argument, message in (("nsink", "nsink"), ("cache_length", "use --kv_cache and --cache_length")):
        assert main(["generate", "no/such/model", "--kv_cache", "lastrec", f"--kv_cache_args.{argument}", "4"]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert "no/such/model" not in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--config",)])
def test_out_with_a_slash_at_its_end_is_a_folder_and_refused(options, tmp_path, capsys):
    out = f"{tmp_path / 'new'}{os.sep}"
    if options:
        (tmp_path / "options.yaml").write_text(f"out: {out}\n")
        arguments = ["--config", str(tmp_path / "options.yaml")]
    else:
        arguments = ["--out", out]
    assert main(["generate", "no/such/model", *arguments]) == 1
    assert f"--out {out!r} is a folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture
def unread(monkeypatch):
    """Fails a test in which the weights of a model are read."""
    monkeypatch.setattr("litgpt.engine.loading.speed_up_decode", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("litgpt.generate.tp.run_in_processes", lambda *_: pytest.fail("processes were started"))


@pytest.mark.parametrize("options", [(), ("--kv_cache", "dense-int8")], ids=len)
def test_a_prompt_that_is_too_long_is_refused_before_weights_are_read(folder, unread, capsys, options):
    assert generate(folder, "--prompt", "x" * 300, *options) == 1
    error = capsys.readouterr().err
    assert "tokens, but the model's context is 256: shorten the prompt" in error
    assert "Model loaded" not in error


LONG = ("--prompts", {"prompt": "Hi"}, {"prompt": "x" * 300})
SHORTER = ("--prompts", {"prompt": "Hi"}, {"prompt": "x" * 100})
UNFIT = [
    (LONG, r"line 2: prompt and new tokens come to 315 tokens, but the model's context is 256"),
    (("--prompts", {"prompt": "Hi", "logit_bias": {"1000": 1}}), r"line 1: logit_bias has the token 1000"),
    (
        ("--kv_cache", "lastrec", "--cache_length", "300"),
        r"cache_length must be in 1..256, the model's context, got 300",
    ),
    (("--kv_cache", "h2o", "--kv_cache_args.budget", "[1, 2, 3]"), r"budget must be .* 2 positive numbers"),
    ((*SHORTER, "--kv_cache", "dense", "--cache_length", "20"), r"line 2: .* holds cache_length=20 and does not evict"),
    (
        (*SHORTER, "--kv_cache", "kvzip", "--cache_length", "16"),
        r"line 2: KVzipPolicy reads a prompt of 103 tokens twice",
    ),
    (
        ("--kv_cache", "kvzip", "--kv_cache_args.budget", "scores", "--num_samples", "2"),
        r"are for one sequence at a time",
    ),
]


@pytest.mark.parametrize(("options", "message"), UNFIT)
def test_prompts_and_caches_that_do_not_fit_are_refused_before_weights_are_read(
    options, message, folder, unread, tmp_path, capsys
):
    lines = [json.dumps(option) for option in options if isinstance(option, dict)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    options = [option for option in options if not isinstance(option, dict)]
    options[1:1] = [tmp_path / "prompts.jsonl"] * bool(lines)
    assert generate(folder, *options) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "name", ["generate_sequentially", "generate_tp", "generate_speculatively", "generate_full", "chat", "serve"]
)
def test_every_command_refuses_caches_that_do_not_fit_before_weights_are_read(name, folder, unread, capsys):
    models = [str(folder)] * (2 if name == "generate_speculatively" else 1)
    more = {"generate_full": ["--finetuned_path", str(folder)], "serve": ["--port", "0"]}.get(name, [])
    assert main([name, *models, *more, "--kv_cache", "lastrec", "--cache_length", "300"]) == 1
    assert "cache_length must be in 1..256, the model's context, got 300" in capsys.readouterr().err


def test_prompts_that_are_read_twice_can_be_answered_one_at_a_time(folder, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": letter * 60}) for letter in "ab"))
    options = (
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--kv_cache",
        "kvzip",
        "--cache_length",
        "32",
        "--batch_size",
        1,
    )
    assert generate(folder, *options) in (0, None)
    assert len(capsys.readouterr().out.splitlines()) == 2
