"""Key-value caches side by side: what is measured equals what is written out by hand, and nothing is run twice."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from random import Random

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.comparison.asking import INSIDE, OUTSIDE, SECOND, ask, needle_retention
from litgpt.comparison.figure import Figure
from litgpt.comparison.grid import TASKS, make_grid, parse_tasks
from litgpt.comparison.perplexity import predict, windows_of
from litgpt.comparison.plot import Point, pareto_front
from litgpt.comparison.records import FILE_NAME, Records
from litgpt.comparison.run import Comparison
from litgpt.kvcache import CacheSpec
from litgpt.prompt_frame import PromptFrame
from litgpt.prompts import ChatTemplate, PromptStyle
from litgpt.tasks.document import lines_of, read_document
from litgpt.tasks.retrieval import retrieval
from litgpt.tasks.ruler import RULER
from litgpt.tasks.sample import Prompt, longest_prompt

LENGTH = 1536
PROSE = lines_of(read_document(None))
MAKERS = {**RULER, "retrieval": lambda random, n: retrieval(random, n, PROSE, 0.5)}


@pytest.fixture(scope="module")
def llm():
    tokenizer = tiny_tokenizer()
    gpt = tiny_gpt(name="tiny", block_size=2048, n_layer=2, **VOCABULARY)
    return LLM(gpt, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer))


@pytest.fixture(scope="module")
def frame(llm):
    return PromptFrame(llm.tokenizer, llm.prompt_style)


@pytest.fixture(scope="module")
def checkpoint(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    llm.save(folder)
    return folder


# --- perplexity


def test_perplexity_with_a_cache_that_keeps_everything_is_that_of_one_forward_pass(llm):
    windows = windows_of(llm.tokenizer.encode(read_document(None)).tolist(), 400, 2)
    found = predict(llm, CacheSpec(cache_length=400), windows)
    losses = []
    for window in windows:
        with torch.inference_mode():
            logits = llm.model(torch.tensor([window]))[0]
        losses.append(torch.nn.functional.cross_entropy(logits[299:-1], torch.tensor(window[300:]), reduction="none"))
    torch.testing.assert_close(torch.tensor(found.losses), torch.cat(losses), rtol=1e-4, atol=1e-4)
    figures = found.figures()
    assert figures["perplexity"].value == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)
    assert figures["kl"] == (0, 0, 0)
    assert figures["same_top"].value == figures["perplexity_ratio"].value == 1


def test_divergence_is_that_of_the_tokens_which_a_cache_sees(llm):
    window = llm.tokenizer.encode(read_document(None)).tolist()[:40]
    found = predict(llm, CacheSpec("lastrec", cache_length=8), [window])
    sessions = [llm.session("lastrec", 8), llm.session()]
    expected = []
    for session in sessions:
        session.extend(window[:30])
        one_by_one = torch.cat([session.predict([token]) for token in window[30:]])
        expected.append(one_by_one.log_softmax(-1).double())
    q, p = expected
    torch.testing.assert_close(
        torch.tensor(found.divergences).double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5
    )
    assert found.figures()["kl"].value > 0.01


# --- samples


@pytest.mark.parametrize("name", MAKERS)
def test_the_answer_is_in_the_context_and_all_fits_the_length(name, frame):
    prompt = longest_prompt(lambda n: MAKERS[name](Random(3), n), frame, LENGTH, name)
    assert LENGTH * 0.8 < prompt.length <= LENGTH
    context = "".join(prompt.sample.lines)
    for i, question in enumerate(prompt.sample.questions):
        assert question.score(question.right.upper()) == 1.0
        assert question.score("no idea") == 0.0
        assert all(answer in context for answer in question.answers)
        needle = frame.tokenizer.decode([prompt.context[place] for place in prompt.needle(i)])
        assert needle == "".join(prompt.sample.lines[index] for index in sorted(question.needles))
        assert not question.needles or all(answer in needle for answer in question.answers)


@pytest.mark.parametrize("name", MAKERS)
def test_samples_depend_on_the_seed_alone(name):
    make = MAKERS[name]
    assert make(Random(1), 40) == make(Random(1), 40) != make(Random(2), 40)


def test_common_and_frequent_words_are_those_that_are_counted():
    for task, count in ((RULER["cwe"], 10), (RULER["fwe"], 3)):
        sample = task(Random(5), 400)
        words = [word for line in sample.lines for word in line.split() if word.strip(".").isalpha() or "-" in word]
        counts = {word: words.count(word) for word in set(words)}
        answers = set(sample.questions[0].answers)
        assert len(answers) == count
        assert min(counts[word] for word in answers) > max(counts[word] for word in counts.keys() - answers)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_are_at_their_depth(depth):
    sample = retrieval(Random(1), 100, PROSE, depth)
    assert abs(sample.questions[0].needles[0] / (len(sample.lines) - 1) - depth) < 0.02


def test_each_of_several_numbers_is_asked_for_where_it_stands():
    sample = retrieval(Random(1), 100, PROSE, 0.5, numbers=5)
    assert len(sample.lines) == 105
    assert len({question.answers for question in sample.questions}) == 5
    for question in sample.questions:
        assert question.answers[0] in sample.lines[question.needles[0]]


@pytest.mark.parametrize("style", ["default", "chatml", "llama3", "alpaca"])
def test_questions_continue_the_conversation_of_the_prompt_style(style):
    tokenizer, style = tiny_tokenizer(), PromptStyle.from_name(style)
    prompt = Prompt(RULER["niah_multikey_2"](Random(1), 3), PromptFrame(tokenizer, style))
    first, second = prompt.sample.questions
    tokens = prompt.context + prompt.question(0) + prompt.right(0) + prompt.question(1) + prompt.right(1)
    context = f"{prompt.sample.intro}\n\n{''.join(prompt.sample.lines)}\n{first.text}"
    text = style.render(
        [
            {"role": "user", "content": context},
            {"role": "assistant", "content": first.lead + first.right},
            {"role": "user", "content": f"\n{second.text}"},
        ]
    )
    assert tokenizer.decode(tokens) == tokenizer.decode(tokenizer.encode(f"{text}{second.lead}{second.right}"))


# --- asking


def test_questions_are_asked_inside_outside_and_a_second_time(llm, frame):
    prompt = longest_prompt(lambda n: MAKERS["retrieval"](Random(1), n), frame, LENGTH, "retrieval")
    replies = {reply.question: reply for reply in ask(llm, CacheSpec(cache_length=LENGTH), prompt)}
    assert list(replies) == [INSIDE, SECOND, OUTSIDE]
    assert {reply.retention for reply in replies.values()} == {1.0}
    tokens = prompt.context + prompt.question(0) + prompt.right(0)
    expected = []
    for i in (0, 1):
        tokens += [*prompt.question(i), *prompt.right(i)] if i else []
        n = len(prompt.right(i))
        with torch.inference_mode():
            logprobs = llm.model(torch.tensor([tokens]))[0, -n - 1 : -1].log_softmax(-1)
        expected.append(logprobs.gather(1, torch.tensor(prompt.right(i))[:, None]).mean().item())
    assert replies[INSIDE].logprob == pytest.approx(expected[0], abs=1e-3)
    assert replies[OUTSIDE].logprob == pytest.approx(expected[0], abs=1e-3)
    assert replies[SECOND].logprob == pytest.approx(expected[1], abs=1e-3)


def test_retention_counts_positions_that_are_still_held(llm):
    session = llm.session("lastrec", cache_length=10, n_sink=2)
    session.extend(range(31))  # the last one is not run yet: 30 are cached
    assert [needle_retention(session, needle) for needle in ([0, 1], [5, 6], [21, 22, 23, 24])] == [1.0, 0.0, 0.75]
    assert needle_retention(session, []) is None


# --- figures


def test_intervals_are_wilsons_for_scores_and_normal_for_means():
    assert Figure.share([1.0] * 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    assert Figure.share([0.0, 1.0] * 5) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert Figure.mean([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 1.2348, 3.7652), abs=1e-4)
    assert Figure.mean([7.0]) == (7.0, 7.0, 7.0)


def test_the_pareto_front_has_what_nothing_smaller_beats():
    points = [Point(x, y, y, y, 0, "") for x, y in ((1, 0.2), (2, 0.1), (2, 0.5), (3, 0.5), (4, 0.9))]
    assert [(p.x, p.y) for p in pareto_front(points, True)] == [(1, 0.2), (2, 0.5), (4, 0.9)]
    assert [(p.x, p.y) for p in pareto_front(points, False)] == [(1, 0.2), (2, 0.1)]


# --- runs


def comparison(llm, caches="dense,lastrec(n_sink=2)", tasks=("perplexity", "vt"), **kwargs):
    cells = make_grid(llm.model, caches, [0.5], [1024])
    return Comparison(llm, cells, tasks, read_document(None), samples=1, **kwargs)


def run_all(comparison, folder=None):
    records = Records(folder)
    return [comparison.run(cell, task, records) for cell, task in comparison.runs]


def test_finished_runs_are_not_repeated(llm, tmp_path, monkeypatch):
    first = [(record["key"], new) for record, new in run_all(comparison(llm), tmp_path)]
    assert [new for _, new in first] == [True] * 4
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    (tmp_path / FILE_NAME).write_text("\n".join([*lines[:3], lines[3][:50]]))  # the last one was interrupted
    again = [(record["key"], new) for record, new in run_all(comparison(llm), tmp_path)]
    assert [key for key, _ in again] == [key for key, _ in first]
    assert [new for _, new in again] == [False, False, False, True]
    assert all(not new for _, new in run_all(comparison(llm), tmp_path))
    for other in ({"seed": 5}, {"prompt_chunksize": 100}):
        assert all(new for _, new in run_all(comparison(llm, tasks=("vt",), **other), tmp_path))


def test_bytes_are_those_of_the_caches(llm):
    records = [record for record, _ in run_all(comparison(llm, tasks=("speed",)))]
    dense, half = records
    assert dense["bytes"] == dense["dense_bytes"] == 2 * 2 * 2 * 1024 * 16 * 4
    assert half["bytes"] * 2 == dense["bytes"]
    assert (half["slots"], half["budget"], dense["budget"]) == (512, 0.5, 1.0)
    assert all(
        record[name] > 0 for record in records for name in ("prefill_tokens_per_second", "decode_tokens_per_second")
    )


def test_the_command_writes_its_reports(checkpoint, tmp_path, capsys):
    args = ["compare_caches", str(checkpoint), "--caches", "dense,lastrec(n_sink=2)", "--budgets", "0.5"]
    args += ["--length", "700,900", "--tasks", "speed,perplexity,retrieval,niah_single_1,vt", "--samples", "1"]
    args += ["--out", str(tmp_path / "out"), "--precision", "32-true"]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert all(text in captured.out for text in ("lastrec(n_sink=2)", "perplexity", "350"))
    assert main([*args, "--json"]) == 0
    captured = capsys.readouterr()
    assert "20 of 20 runs were done before" in captured.err
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [(row["cache"], row["length"], row["slots"]) for row in rows] == [
        ("dense", 700, 700),
        ("lastrec(n_sink=2)", 700, 350),
        ("dense", 900, 900),
        ("lastrec(n_sink=2)", 900, 450),
    ]
    assert rows[0]["kl"] == [0, 0, 0]
    assert rows[1]["kl"][0] > 0
    table = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [float(line["perplexity"]) for line in table] == [row["perplexity"][0] for row in rows]
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 4 + (2 + 4) + 1 + (2 + 4)
    for row in rows:
        assert row["ruler_inside_score"][0] == (row["vt_inside_score"][0] + row["niah_single_1_inside_score"][0]) / 2
    page = (tmp_path / "out" / "report.html").read_text()
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert sum(1 for element in tree.iter() if element.tag == "svg") > 10
    assert not any(text in page for text in ("nan", "<script"))
    assert [len(list(body)) for body in tree.iter("tbody")] == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caches": "dense,nosuch"}, "no key-value cache is called 'nosuch'"),
        ({"caches": "lastrec(sinks=4)"}, "has no argument 'sinks'"),
        ({"caches": "lastrec(cache_length=4)"}, "--budgets the slots"),
        ({"caches": "lastrec(n_sink"}, "a cache is a name"),
        ({"caches": "lastrec(n_sink=800)"}, "cannot have a budget of 0.5 of 700 tokens"),
        ({"caches": "random(n_sink=[1, 2])"}, "n_sink must be in"),
        ({"caches": ","}, "there are no caches"),
        ({"budgets": "0.5,1.5"}, "at most 1, got 1.5"),
        ({"budgets": "half"}, "--budgets takes numbers"),
        ({"length": "4096"}, "the model's context, got 4,096"),
        ({"length": "100", "tasks": "vt"}, "length 100 is too short for the task vt"),
        ({"tasks": "vt,needle"}, "no task is called 'needle'"),
        ({"samples": "0"}, "samples must be at least 1"),
        ({"text": "short.txt", "tasks": "perplexity"}, "the text has 6 tokens"),
        ({"text": "none.txt"}, "No such file"),
    ],
)
def test_wrong_input_is_refused_at_once_in_one_line(options, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Short.")
    given = {"length": "700", "tasks": "perplexity", "caches": "lastrec", **options}
    assert main(["compare_caches", str(checkpoint), *(f"--{key}={value}" for key, value in given.items())]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_length_is_refused_before_the_first_run_if_any_sample_is_longer(llm, frame):
    name, samples = "niah_multikey_2", 12
    shortest = [Prompt(RULER[name](Random(f"7 {name} {i}"), 1), frame).length for i in range(samples)]
    fits = max(shortest)
    assert shortest[0] < fits
    for length in (fits, fits - 1):
        cells = make_grid(llm.model, "dense", [], [length])
        if length == fits:
            Comparison(llm, cells, [name], read_document(None), samples, seed=7)
            continue
        with pytest.raises(
            ValueError, match=f"length {length} is too short for .*: its shortest sample has {fits} tokens"
        ):
            Comparison(llm, cells, [name], read_document(None), samples, seed=7)


def test_caches_may_have_arguments_with_commas(llm):
    cells = make_grid(llm.model, "lastrec(n_sink=2) , dense, random(run=2, n_sink=1)", [0.5], [64])
    assert [cell.name for cell in cells] == ["lastrec(n_sink=2)", "dense", "random(run=2, n_sink=1)"]
    assert dict(cells[2].spec.arguments) == {"run": 2, "n_sink": 1}


def test_tasks_have_names_for_several():
    assert parse_tasks("all") == list(TASKS)
    assert parse_tasks("ruler,vt,speed") == [*RULER, "speed"]
