"""Runs every task with every cache at every budget, unless that was done before."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from random import Random
from typing import Any

from litgpt.api import LLM
from litgpt.comparison.asking import INSIDE, OUTSIDE, SECOND, Reply, ask
from litgpt.comparison.figure import Figure
from litgpt.comparison.grid import Cell
from litgpt.comparison.perplexity import predict, windows_of
from litgpt.comparison.records import Record, Records, key_of
from litgpt.comparison.speed import DECODED, measure_speed
from litgpt.fingerprint import fingerprint
from litgpt.kvcache import CacheSpec
from litgpt.prompt_frame import PromptFrame
from litgpt.tasks.document import lines_of
from litgpt.tasks.retrieval import DEPTHS, retrieval
from litgpt.tasks.ruler import RULER
from litgpt.tasks.sample import Prompt, Sample, check_length, longest_prompt

VERSION = 1  # of what the tasks are: runs of other versions are not comparable


@dataclass(eq=False)
class Comparison:
    """Everything that is run, on one model and one text.

    Args:
        llm: the model.
        cells: caches at budgets and lengths.
        tasks: by name.
        document: text for perplexity, prose around the needles, and speed.
        samples: of every task (at every depth); windows of the text.
        seed: of the samples.
        prompt_chunksize: most tokens of a prefill call (None: the whole prompt).

    Raises:
        ValueError: before anything is run, if a length is too short for a task, or the text for a length.
    """

    llm: LLM
    cells: Sequence[Cell]
    tasks: Sequence[str]
    document: str
    samples: int = 5
    seed: int = 1234
    prompt_chunksize: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("prompt_chunksize", self.prompt_chunksize)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._frame = PromptFrame(self.llm.tokenizer, self.llm.prompt_style)
        self._text = self.llm.tokenizer.encode(self.document).tolist()
        self._prose = lines_of(self.document)
        self._prompts = lru_cache(maxsize=len(self.tasks))(self._make_prompts)
        for length in dict.fromkeys(cell.length for cell in self.cells):
            if length <= DECODED + 1 and "speed" in self.tasks:
                raise ValueError(f"length {length} is too short to measure the speed: give at least {DECODED + 2}")
            windows_of(self._text, length, 1)
            for task in self.tasks:
                for make in self._makers(task):  # of all samples, which differ: none fails after hours
                    check_length(make, self._frame, length, task)
        model = self.llm.model
        self._about = {
            "version": VERSION,
            "fingerprint": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "document": sha256(self.document.encode()).hexdigest()[:16],
            "prompt_style": sha256(
                repr((self._frame.before, self._frame.to_answer, self._frame.to_next)).encode()
            ).hexdigest()[:8],
            "samples": self.samples,
            "seed": self.seed,
            "prompt_chunksize": self.prompt_chunksize,
        }

    @property
    def device(self) -> str:
        return self._about["device"]

    @property
    def dtype(self) -> str:
        return self._about["dtype"]

    @property
    def runs(self) -> list[tuple[Cell, str]]:
        """All runs, length by length and task by task."""
        lengths = dict.fromkeys(cell.length for cell in self.cells)
        return [
            (cell, task) for length in lengths for task in self.tasks for cell in self.cells if cell.length == length
        ]

    def run(self, cell: Cell, task: str, records: Records) -> tuple[Record, bool]:
        """The record of one run, and whether it was done now; it is then added to `records`."""
        settings = self._settings(cell, task)
        key = key_of(settings)
        record = records.get(key)
        new = record is None
        if record is None:
            record = {"key": key, **settings, **self._describe(cell), **self._run(cell, task)}
            records.add(record)
        return {**record, "cache": cell.name}, new

    def _settings(self, cell: Cell, task: str) -> dict[str, Any]:
        """All that a run depends on."""
        return {"task": task, "length": cell.length, "spec": cell.spec.describe(), **self._about}

    def _describe(self, cell: Cell) -> dict[str, Any]:
        model = self.llm.model
        return {
            "model": model.config.name,
            "budget": cell.budget,
            "slots": cell.spec.cache_length,
            "bytes": cell.spec.size(model, 1)[0] // 8,
            "dense_bytes": CacheSpec(cache_length=cell.length).size(model, 1)[0] // 8,
        }

    def _run(self, cell: Cell, task: str) -> dict[str, Any]:
        if task == "speed":
            return measure_speed(self.llm, cell.spec, self._text[: cell.length - DECODED], self.prompt_chunksize)
        if task == "perplexity":
            windows = windows_of(self._text, cell.length, self.samples)
            found = predict(self.llm, cell.spec, windows, self.prompt_chunksize)
            return {"figures": found.figures(), "n": len(found.losses)}
        prompts = self._prompts(task, cell.length)
        replies = [reply for one in prompts for reply in ask(self.llm, cell.spec, one, self.prompt_chunksize)]
        return {"figures": summary(replies), "n": len(prompts), "replies": [reply.as_dict() for reply in replies]}

    def _make_prompts(self, task: str, length: int) -> list[Prompt]:
        """The samples of a task as prompts of at most `length` tokens, the same for the same seed."""
        return [longest_prompt(make, self._frame, length, task) for make in self._makers(task)]

    def _makers(self, task: str) -> Iterator[Callable[[int], Sample]]:
        """For each sample of a task, what makes it with so many lines of filling."""
        if task in RULER:
            kinds = [RULER[task]]
        elif task == "retrieval":
            kinds = [partial(retrieval, prose=self._prose, depth=depth) for depth in DEPTHS]
        else:
            return
        for i in range(self.samples):
            for kind in kinds:
                yield lambda n, kind=kind, i=i: kind(Random(f"{self.seed} {task} {i}"), n)


def summary(replies: Sequence[Reply]) -> dict[str, Figure]:
    """Means by where the question stands: `inside_score`, `outside_logprob`, `second_retention`, and so on."""
    figures = {}
    for where in (INSIDE, OUTSIDE, SECOND):
        found = [reply for reply in replies if reply.question == where]
        if not found:
            continue
        figures[f"{where}_score"] = Figure.share([reply.score for reply in found])
        figures[f"{where}_logprob"] = Figure.mean([reply.logprob for reply in found])
        if held := [reply.retention for reply in found if reply.retention is not None]:
            figures[f"{where}_retention"] = Figure.mean(held)
    return figures
