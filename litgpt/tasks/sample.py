"""One sample of a task: a long context, and questions about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from litgpt.kvcache.memory import largest
from litgpt.prompt_frame import PromptFrame

ANSWER_ROOM = 16  # tokens that an answer may have beyond the right one's


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        text: what is asked.
        lead: the words that begin the answer.
        answers: what the answer has to contain, all of them.
        needles: indices of the context's lines that the answer stands in.
    """

    text: str
    lead: str
    answers: tuple[str, ...]
    needles: tuple[int, ...] = ()

    @property
    def right(self) -> str:
        """The right answer, as it follows the lead."""
        return " " + ", ".join(self.answers)

    def score(self, answer: str) -> float:
        """Share of the expected answers that occur in `answer`, upper or lower case."""
        found = answer.casefold()
        return sum(one.casefold() in found for one in self.answers) / len(self.answers)


@dataclass(frozen=True)
class Sample:
    """A context and one or two questions about it.

    Attributes:
        intro: what the lines of the context are.
        lines: the context, each with its line end.
        questions: the first, and perhaps a second one on the same cache, which the first and its answer do not help with.
        depth: where the first question's answer stands, from 0 (the beginning) to 1.
    """

    intro: str
    lines: tuple[str, ...]
    questions: tuple[Question, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A sample as tokens. Every line is encoded on its own, so that places in the text are places in the sequence."""

    sample: Sample
    frame: PromptFrame

    @cached_property
    def context(self) -> list[int]:
        tokens = list(self.frame.begin(self.sample.intro + "\n\n"))
        for line in self.sample.lines:
            tokens += self.frame.line(line)
        return tokens

    def question(self, i: int) -> list[int]:
        """Tokens of question i, up to the lead of its answer."""
        question, frame = self.sample.questions[i], self.frame
        before = "\n" if i == 0 else frame.to_next + "\n"
        return list(frame.line(f"{before}{question.text}{frame.to_answer}{question.lead}"))

    def right(self, i: int) -> list[int]:
        """Tokens of the right answer to question i."""
        return list(self.frame.line(self.sample.questions[i].right))

    def needle(self, i: int) -> list[int]:
        """Positions of the lines that answer question i."""
        places, position = [], len(self.frame.begin(self.sample.intro + "\n\n"))
        needles = set(self.sample.questions[i].needles)
        for index, line in enumerate(self.sample.lines):
            size = len(self.frame.line(line))
            if index in needles:
                places += range(position, position + size)
            position += size
        return places

    @property
    def length(self) -> int:
        """Tokens of all, with both questions and room for the answers."""
        asked = range(len(self.sample.questions))
        return len(self.context) + sum(len(self.question(i)) + len(self.right(i)) + ANSWER_ROOM for i in asked)


def longest_prompt(make: Callable[[int], Sample], frame: PromptFrame, length: int, name: str) -> Prompt:
    """The prompt of the sample `make(n)` with the most lines of filling, n, that comes to at most `length` tokens.

    Raises:
        ValueError: if not even one line fits.
    """
    check_length(make, frame, length, name)
    return Prompt(make(largest(lambda n: Prompt(make(n), frame).length <= length, length)), frame)


def check_length(make: Callable[[int], Sample], frame: PromptFrame, length: int, name: str) -> None:
    """Raise `ValueError` if the shortest sample, `make(1)`, has more than `length` tokens."""
    if (shortest := Prompt(make(1), frame).length) > length:
        raise ValueError(f"length {length} is too short for the task {name}: its shortest sample has {shortest} tokens")


def insert(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> tuple[list[str], list[int]]:
    """`lines` with needle i before line `places[i]` of them, and the indices that the needles then have."""
    result, where = list(lines), [0] * len(needles)
    order = sorted(range(len(needles)), key=lambda i: places[i])
    for shift, i in enumerate(order):
        where[i] = places[i] + shift
        result.insert(where[i], needles[i])
    return result, where
