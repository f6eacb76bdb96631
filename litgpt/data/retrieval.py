"""Questions about long texts, made at random: the tasks of `compare_caches`, as samples to train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from litgpt.data.base import SFTModule, no_option
from litgpt.data.encoding import Sample, Splits
from litgpt.prompt_frame import PromptFrame
from litgpt.prompt_style import PromptStyle
from litgpt.tasks.document import lines_of, read_document
from litgpt.tasks.retrieval import DEPTHS, retrieval
from litgpt.tasks.ruler import RULER
from litgpt.tasks.sample import Sample as Task
from litgpt.tasks.sample import longest_prompt
from litgpt.waiting import report_progress, waiting

TASKS = ("retrieval", *RULER)


@dataclass(kw_only=True)
class Retrieval(SFTModule):
    """Conversations about long texts: numbers to find, variables to track, words to count. Nothing is fetched.

    Attributes:
        tasks: names with commas between them, taken in turn: retrieval (a number in prose), niah_single_1, niah_multikey_2,
            niah_multikey_3, vt, cwe, fwe.
        length: tokens of a sample (None: `train.max_seq_length`, or the model's context).
        train_samples, val_samples: how many there are.
        text: a file of prose for the task retrieval (None: Python's reference, which comes with it).
        numbers: most numbers that such a text has, each asked for; at random, at least 2.
        seed: of the samples and of the order.

    Further fields: see `SFTModule`. The prompt style is by default the model's own.
    """

    tasks: str = "retrieval,niah_single_1,niah_multikey_2,vt"
    length: int | None = None
    train_samples: int = 1000
    val_samples: int = 40
    text: Path | None = None
    numbers: int = 2
    mask_prompt: bool = True
    prompt_style: str | PromptStyle | None = None
    val_split_fraction: None = no_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.names = list(filter(None, map(str.strip, self.tasks.split(","))))
        for name in self.names or [""]:
            if name not in TASKS:
                raise ValueError(f"no task is called {name!r}; there are {', '.join(TASKS)}")
        for name, least in (("train_samples", 1), ("val_samples", 0), ("length", 1), ("numbers", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def samples(self) -> Splits:
        length = self.max_seq_length if self.length is None else self.length
        if length < 0:
            raise ValueError("nothing says how long the samples are: give length")
        if 0 < self.max_seq_length < length:
            raise ValueError(f"length {length:,} is more than the {self.max_seq_length:,} tokens of a row")
        prose = lines_of(read_document(self.text))
        frame = PromptFrame(self.tokenizer, self.prompt_style)
        with waiting("Making samples"):
            made, total = [], self.train_samples + self.val_samples
            for i in range(total):
                name = self.names[i % len(self.names)]
                numbers = Random(f"numbers {self.seed} {i}").randint(2, self.numbers)
                make = partial(_make, name, f"{self.seed} {i}", prose, numbers)
                made.append(as_messages(longest_prompt(make, frame, length, name).sample))
                report_progress(i, total)
        return made[self.val_samples :], made[: self.val_samples]


def _make(name: str, seed: str, prose: Sequence[str], numbers: int, n: int) -> Task:
    """A sample of n units of filling."""
    random = Random(seed)
    return (
        retrieval(random, n, prose, random.choice(DEPTHS), numbers) if name == "retrieval" else RULER[name](random, n)
    )


def as_messages(task: Task) -> Sample:
    """A sample as a conversation: its text and first question, the answer, and the second ones if it has them."""
    messages = []
    for i, question in enumerate(task.questions):
        text = f"{task.intro}\n\n{''.join(task.lines)}\n{question.text}" if i == 0 else question.text
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"{question.lead}{question.right}"},
        ]
    return {"messages": messages}
