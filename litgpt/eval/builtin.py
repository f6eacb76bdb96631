"""Tasks that need neither the harness nor a network: perplexity, questions about long texts, and files of one's own."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from litgpt.comparison.figure import standard_error
from litgpt.comparison.perplexity import windows_of
from litgpt.engine.loading import Ready
from litgpt.eval.generating import Prompt, generate_texts
from litgpt.eval.results import TaskResult
from litgpt.eval.scoring import Request, Scorer
from litgpt.kvcache import CacheSpec
from litgpt.prompt_frame import PromptFrame
from litgpt.prompts import encode_prompt
from litgpt.settings import shown
from litgpt.tasks.document import lines_of, read_document
from litgpt.tasks.retrieval import DEPTHS, retrieval
from litgpt.tasks.ruler import RULER
from litgpt.tasks.sample import ANSWER_ROOM, Sample, longest_prompt
from litgpt.waiting import report_progress, waiting

SAMPLES = 20
ANSWER_TOKENS = 64  # of answers to questions of a file
_RULER_NAMES = {"key_value": "niah_multikey_2", "variable_tracking": "vt", "common_words": "cwe"}
BUILT_IN = ("perplexity", "needle", *_RULER_NAMES)
SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Evaluation:
    """What tasks are run on, and how.

    Args:
        ready: the model.
        spec: which caches.
        batch_size: most answers that are generated together.
        length: tokens of a window of text, or of a long text with its question and answer.
        limit: most samples of a task; below 1 it is the share of a file's.
        document: file of text for perplexity and needles (None: Python's reference).
        chat: whether the prompts of a file are questions for the model's chat template.
    """

    ready: Ready
    spec: CacheSpec
    batch_size: int = 8
    length: int = 2048
    limit: float | None = None
    seed: int = 1234
    document: Path | None = None
    chat: bool = False
    prompt_chunksize: int | None = None

    def run(self, task: str) -> TaskResult:
        """The result of a task, by its name or the path of its file.

        Raises:
            ValueError, FileNotFoundError: if there is no such task, or its file cannot be used.
        """
        if Path(task).suffix == ".jsonl":
            return self._questions(Path(task))
        if Path(task).suffix in SUFFIXES:
            return self._perplexity(Path(task))
        return self._perplexity(self.document) if task == "perplexity" else self._long_texts(task)

    def _most(self, default: int) -> int:
        if self.limit is None:
            return default
        return max(1, math.ceil(default * self.limit) if self.limit < 1 else int(self.limit))

    # -- perplexity

    def _perplexity(self, path: Path | None) -> TaskResult:
        """Of a text in windows, each token being predicted from those before it in its window."""
        tokenizer, scorer = self.ready.tokenizer, Scorer(self.ready.model, self.spec, self.prompt_chunksize)
        tokens = tokenizer.encode(read_document(path)).tolist()
        if len(tokens) < 2:
            raise ValueError(f"{path} has too few tokens for a perplexity: {len(tokens)}")
        length = min(self.length, scorer.max_length, len(tokens))
        windows = windows_of(tokens, length, self._most(SAMPLES))
        requests = [Request(tuple(window[:1]), tuple(window[1:])) for window in windows]
        with waiting("Scoring", log=True):
            scores = scorer.score(requests, report_progress)
        losses = [-score.total / len(score.logprobs) for score in scores]
        sizes = [len(tokenizer.decode(list(request.continuation)).encode()) for request in requests]
        bits = [-score.total / size / math.log(2) for score, size in zip(scores, sizes, strict=True)]
        loss, error = _mean(losses)
        perplexity = math.exp(min(loss, 700.0))
        return TaskResult(
            {"bits_per_byte": _mean(bits), "perplexity": (perplexity, perplexity * error)},
            [{"doc_id": i, "loss": x, "bits_per_byte": y} for i, (x, y) in enumerate(zip(losses, bits, strict=True))],
            {"task": "perplexity", "document": str(path or "Python's reference"), "length": length},
            frozenset({"bits_per_byte", "perplexity"}),
        )

    # -- questions about long texts

    def _long_texts(self, task: str) -> TaskResult:
        frame = PromptFrame(self.ready.tokenizer, self.ready.prompt_style)
        if task == "needle":
            prose = lines_of(read_document(self.document))
            makers: Sequence[Callable[..., Sample]] = [partial(retrieval, prose=prose, depth=depth) for depth in DEPTHS]
        else:
            makers = [RULER[_RULER_NAMES.get(task, task)]]
        with waiting("Making samples"):
            made = [
                longest_prompt(
                    lambda n, i=i: makers[i % len(makers)](Random(f"{self.seed} {task} {i}"), n),
                    frame,
                    self.length,
                    task,
                )
                for i in range(self._most(SAMPLES))
            ]
        prompts = [
            Prompt(tuple(one.context + one.question(0)), min(len(one.right(0)) + ANSWER_ROOM, self.length))
            for one in made
        ]
        said = self._answers(prompts)
        questions = [one.sample.questions[0] for one in made]
        scores = [question.score(text) for question, text in zip(questions, said, strict=True)]
        samples = [
            {
                "doc_id": i,
                "question": q.text,
                "target": list(q.answers),
                "resp": text,
                "depth": one.sample.depth,
                "acc": x,
            }
            for i, (q, text, one, x) in enumerate(zip(questions, said, made, scores, strict=True))
        ]
        config = {"task": task, "length": self.length, "seed": self.seed}
        return TaskResult({"acc": _mean(scores)}, samples, config)

    def _answers(self, prompts: Sequence[Prompt]) -> list[str]:
        with waiting("Generating", log=True):
            return generate_texts(
                self.ready, prompts, self.spec, self.batch_size, self.prompt_chunksize, report_progress
            )

    # -- questions of a file

    def _questions(self, path: Path) -> TaskResult:
        questions = list(read_questions(path))
        questions = questions[: self._most(len(questions)) if self.limit else None]
        kinds = {"choices" in one for one in questions}
        if len(kinds) > 1:
            raise ValueError(f"{path} has questions with choices and without: put them into two files")
        result = self._choices(questions) if kinds.pop() else self._open_questions(questions)
        return TaskResult(result.metrics, result.samples, {"task": path.stem, "file": str(path), "chat": self.chat})

    def _tokens(self, prompt: str) -> tuple[int, ...]:
        tokenizer = self.ready.tokenizer
        if self.chat:
            return tuple(encode_prompt(tokenizer, self.ready.prompt_style, prompt).tolist())
        return tuple(tokenizer.encode(prompt).tolist())

    def _choices(self, questions: Sequence[Mapping[str, Any]]) -> TaskResult:
        requests = []
        for one in questions:
            context, space = self._tokens(one["prompt"]), "" if self.chat or one["prompt"][-1:].isspace() else " "
            for choice in one["choices"]:
                rest = self.ready.tokenizer.encode(space + choice, bos=False).tolist()
                requests.append(Request(context, tuple(rest)))
        with waiting("Scoring", log=True):
            scores = iter(Scorer(self.ready.model, self.spec, self.prompt_chunksize).score(requests, report_progress))
        right, right_norm, samples = [], [], []
        for i, one in enumerate(questions):
            totals = [next(scores).total for _ in one["choices"]]
            by_size = [total / len(choice.encode()) for total, choice in zip(totals, one["choices"], strict=True)]
            target = one["answer"]
            right.append(float(totals.index(max(totals)) == target))
            right_norm.append(float(by_size.index(max(by_size)) == target))
            samples.append({"doc_id": i, "doc": dict(one), "target": target, "resps": totals, "acc": right[-1]})
        return TaskResult({"acc": _mean(right), "acc_norm": _mean(right_norm)}, samples, {})

    def _open_questions(self, questions: Sequence[Mapping[str, Any]]) -> TaskResult:
        said = self._answers([Prompt(self._tokens(one["prompt"]), ANSWER_TOKENS) for one in questions])
        right = [float(one["answer"].casefold() in text.casefold()) for one, text in zip(questions, said, strict=True)]
        samples = [
            {"doc_id": i, "doc": dict(one), "target": one["answer"], "resp": text, "acc": x}
            for i, (one, text, x) in enumerate(zip(questions, said, right, strict=True))
        ]
        return TaskResult({"acc": _mean(right)}, samples, {})


def read_questions(path: Path) -> Iterable[dict[str, Any]]:
    """The questions of a file with a JSON object a line: `{"prompt", "answer"}`, or `{"prompt", "choices", "answer"}`, where the
    answer is one of the choices or its number, from 0.

    Raises:
        ValueError: naming a line that is none.
    """
    n = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number} is not JSON: {shown(line)}") from None
        if not isinstance(one, dict) or not isinstance(one.get("prompt"), str) or not one["prompt"]:
            raise ValueError(f'{path}, line {number} must be an object with a "prompt", a text')
        choices, answer = one.get("choices"), one.get("answer")
        if choices is None:
            if not isinstance(answer, str) or not answer:
                raise ValueError(f'{path}, line {number} must have an "answer", a text')
        else:
            if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(x, str) and x for x in choices):
                raise ValueError(f'{path}, line {number}: "choices" must be a list of at least two texts')
            one["answer"] = choices.index(answer) if answer in choices else answer
            if isinstance(one["answer"], bool) or one["answer"] not in range(len(choices)):
                raise ValueError(f'{path}, line {number}: "answer" must be one of the choices, or its number from 0')
        n += 1
        yield one
    if not n:
        raise ValueError(f"{path} has no questions")


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return math.fsum(values) / len(values), standard_error(values)
