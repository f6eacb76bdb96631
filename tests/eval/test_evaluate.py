"""The command evaluate: built-in tasks, files, and the LM Evaluation Harness where it is installed."""

import json
import math

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer, write_lora

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.eval.builtin import read_questions
from litgpt.eval.evaluate import convert_and_evaluate
from litgpt.prompts import ChatTemplate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    llm = LLM(tiny_gpt(**VOCABULARY, block_size=512), Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer))
    folder = tmp_path_factory.mktemp("evaluated") / "tiny"
    llm.save(folder)
    return folder


@pytest.fixture
def evaluate(checkpoint, tmp_path):
    def run(tasks, **options):
        convert_and_evaluate(checkpoint, tasks, out_dir=tmp_path, dtype="float32", **options)
        return json.loads((tmp_path / "results.json").read_text())

    return run


def write_lines(path, *objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(path)


def test_perplexity_is_that_of_a_full_pass_and_the_table_shows_it(evaluate, checkpoint, tmp_path, capsys):
    (tmp_path / "story.txt").write_text("A llama walks over the hill. " * 6)
    results = evaluate(str(tmp_path / "story.txt"), length=64)
    llm = LLM.load(checkpoint, precision="32-true")
    tokens = llm.tokenizer.encode("A llama walks over the hill. " * 6)
    losses = []
    for window in tokens[: len(tokens) // 64 * 64].long().split(64):
        losses.append(torch.nn.functional.cross_entropy(llm.model(window[None, :-1])[0], window[1:]).item())
    expected = math.exp(sum(losses) / len(losses))
    assert results["results"]["story"]["perplexity,none"] == pytest.approx(expected, rel=1e-4)
    table = capsys.readouterr().out
    assert "|Tasks|Version|Filter|n-shot|Metric" in table
    assert f"{expected:.4f}"[:5] in table
    config = evaluate(str(tmp_path / "story.txt"), length=2000)["configs"]["story"]
    assert config["length"] == len(tokens)  # all of a text that is shorter
    (tmp_path / "empty.txt").write_text("A")
    with pytest.raises(ValueError, match="too few tokens"):
        evaluate(str(tmp_path / "empty.txt"))


def test_questions_of_files(evaluate, checkpoint, tmp_path):
    llm = LLM.load(checkpoint, precision="32-true")
    prompt = "One two"
    said = llm.generate(prompt, temperature=0, max_new_tokens=64)
    asked = write_lines(
        tmp_path / "open.jsonl", {"prompt": prompt, "answer": said[5:30]}, {"prompt": prompt, "answer": "never"}
    )
    assert evaluate(asked, apply_chat_template=True)["results"]["open"]["acc,none"] == 0.5
    choices = [" b", " cd", " e f"]
    chosen = write_lines(
        tmp_path / "chosen.jsonl", *({"prompt": prompt, "choices": choices, "answer": i} for i in range(3))
    )
    results = evaluate(chosen)
    assert results["results"]["chosen"]["acc,none"] == pytest.approx(1 / 3)
    context = llm.tokenizer.encode(prompt).long()
    for choice, total in zip(choices, results["samples"]["chosen"][0]["resps"], strict=True):
        rest = llm.tokenizer.encode(" " + choice).long()
        logprobs = llm.model(torch.cat((context, rest))[None, :-1])[0].log_softmax(-1)[-len(rest) :]
        assert total == pytest.approx(logprobs.gather(1, rest[:, None]).sum().item(), abs=1e-3)


def test_long_texts_score_the_same_for_any_batch_size(evaluate):
    tasks = "needle,key_value"
    options = {"length": 500, "limit": 4, "kv_cache": "lastrec", "cache_length": 300}
    first, second = (evaluate(tasks, batch_size=rows, **options) for rows in (1, "auto"))
    assert first["samples"] == second["samples"]
    assert set(first["results"]) == set(tasks.split(","))
    assert first["n-samples"]["needle"]["effective"] == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", 'line 1 must be an object with a "prompt"'),
        ('{"prompt": "a"}', 'line 1 must have an "answer"'),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "at least two texts"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "d"}', "one of the choices"),
        ("", "has no questions"),
    ],
)
def test_bad_files_of_questions_name_the_line(tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        list(read_questions(tmp_path / "bad.jsonl"))


def test_errors_are_one_line(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("litgpt.eval.evaluate._has_harness", lambda: False)
    for options, said in (
        (["--tasks", "hellaswag"], "litgpt[eval]"),
        (["--tasks", "nothing.jsonl"], "no file 'nothing.jsonl'"),
        (["--tasks", "needle", "--batch_size", "0"], "batch_size must be a positive integer, 'auto'"),
        (["--tasks", "needle", "--limit", "0"], "limit must be more than 0"),
        (["--tasks", "needle", "--num_fewshot", "-1"], "num_fewshot must be at least 0"),
        (["--tasks", "needle", "--out_dir", f"{checkpoint}/model_config.yaml"], "is a file, and a folder is needed"),
        (["--tasks", "needle", "--length", "20"], "too short for the task needle"),
    ):
        assert main(["evaluate", str(checkpoint), *options]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("litgpt: error: ")
        assert said in error
    assert main(["evaluate", "list"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["perplexity", "needle"]


def test_a_task_of_the_harness(evaluate, checkpoint, tmp_path, capsys):
    """The numbers are those of the built-in tasks on the same questions."""
    pytest.importorskip("lm_eval")
    lines = [{"prompt": f"{word} one", "choices": ["a b", "c"], "answer": 1} for word in ("One", "Two", "Three")]
    questions = write_lines(tmp_path / "mine.jsonl", *lines)
    (tmp_path / "mine.yaml").write_text(
        "task: mine_again\ndataset_path: json\ndataset_kwargs:\n  data_files: "
        f"{questions}\ntest_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{{{prompt}}}}'\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    results = evaluate(f"{questions},{tmp_path / 'mine.yaml'}")
    assert "mine_again" in capsys.readouterr().out
    own, theirs = results["samples"]["mine"], results["samples"]["mine_again"]
    for a, b in zip(own, theirs, strict=True):
        assert a["resps"] == pytest.approx([float(x[0][0]) for x in b["resps"]], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"kv_cache": "h2o-int8", "cache_length": 200}])
def test_weights_of_loras_and_quantised_ones_under_any_cache(checkpoint, tmp_path, options):
    """A folder of LoRA weights is the model with these merged."""
    write_lora(checkpoint, tmp_path / "lora")
    (tmp_path / "story.txt").write_text("A llama walks over the hill. " * 12)
    LLM.load(tmp_path / "lora", precision="32-true").save(tmp_path / "merged")
    scores = []
    for folder in (tmp_path / "lora", tmp_path / "merged", checkpoint):
        out = tmp_path / "out" / folder.name
        convert_and_evaluate(folder, str(tmp_path / "story.txt"), out_dir=out, dtype="float32", length=150, **options)
        scores.append(json.loads((out / "results.json").read_text())["results"]["story"]["perplexity,none"])
    tuned, merged, plain = scores
    assert tuned == pytest.approx(merged, rel=1e-4)
    assert abs(tuned / plain - 1) > 0.01
