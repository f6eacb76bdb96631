"""Questions about long texts from files: those of LongBench v2 (arXiv:2412.15204) and HELMET (arXiv:2410.02694)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from litgpt.data.base import SFTModule
from litgpt.data.encoding import Sample, Splits
from litgpt.data.json_data import PlacedSample, read_values
from litgpt.data.text_files import files_in
from litgpt.prompt_frame import PromptFrame
from litgpt.prompt_style import PromptStyle
from litgpt.settings import Settings

CHOICES = "ABCD"
CUT = "\n[...]\n"  # where a part of a text is left out
SLACK = 8  # tokens: a text that is encoded in one may have some more than its parts


@dataclass(kw_only=True)
class LongTexts(SFTModule):
    """Samples of a JSON or JSONL file, or of all such files of a folder. A text that is too long loses its middle.

    Every record has a text, a question and an answer, in one of these forms: `context`, `question`, `choice_A` to `choice_D` and
    the letter `answer` (LongBench v2); `ctxs` or `docs`, a list of passages with `text` and perhaps `title`, or `context`, with
    `question` or `query` and `answer` or `answers` (HELMET); or `input`, text and question in one, and `outputs` (HELMET's tasks of
    RULER).

    Attributes:
        path: the file or folder.
        length: most tokens of a sample (None: `train.max_seq_length`, or the model's context).

    Further fields: see `SFTModule`. The prompt style is by default the model's own.
    """

    path: Path
    length: int | None = None
    mask_prompt: bool = True
    prompt_style: str | PromptStyle | None = None
    val_split_fraction: float | None = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path = Path(self.path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist: `path` is a JSON or JSONL file, or a folder of some")

    def samples(self) -> Splits:
        frame = PromptFrame(self.tokenizer, self.prompt_style)
        length = self.max_seq_length if self.length is None else self.length
        found = []
        for file in files_in(self.path, ".json", ".jsonl", deep=True):
            for place, record in read_values(file).items():
                where = f"{file}, {place}"
                if not isinstance(record, Mapping):
                    raise ValueError(f"{where}: a record is a mapping, got {type(record).__name__}")
                found.append(_fitting(*parts_of_record(Settings(record, where)), frame, length, where))
        return self.split(found)


def parts_of_record(record: Settings) -> tuple[str, str, str]:
    """Text, question (perhaps empty: it is in the text) and answer of a record; `ValueError` if it has another form."""
    if "outputs" in record:
        return record.text("input"), "", ", ".join(_texts(record, "outputs"))
    question = record.text("question" if "question" in record else "query")
    if "choice_A" in record:
        record.only("answer", tuple(CHOICES), None, "choices")
        choices = "\n".join(f"({c}) {record.text(f'choice_{c}')}" for c in CHOICES)
        return record.text("context"), f"{question}\n{choices}\nWhich choice is right?", f"({record.text('answer')})"
    answer = _texts(record, "answers" if "answers" in record else "answer")[0]
    for name in ("ctxs", "docs"):
        if name in record:
            passages = [Settings(one, f"{record.where}: {name}") for one in record.value(name, list[dict])]
            return "\n\n".join(map(_passage, passages)), question, answer
    return record.text("context"), question, answer


def _passage(passage: Settings) -> str:
    title = passage.text("title", None, null=True)
    return f"{title}\n{passage.text('text')}" if title else passage.text("text")


def _texts(record: Settings, name: str) -> list[str]:
    """A field that is a text or a list of texts."""
    value = record.value(name, str | list[str])
    if not value and value != "":
        raise record.error(name, "must hold a text")
    return [value] if isinstance(value, str) else value


def _fitting(text: str, question: str, answer: str, frame: PromptFrame, length: int, where: str) -> Sample:
    """A sample of at most `length` tokens (-1: any number)."""
    tokenizer, end = frame.tokenizer, f"\n\n{question}" if question else ""
    if length >= 0:
        around = len(frame.begin("")) + len(frame.line(f"{end}{frame.to_answer}")) + len(frame.line(answer))
        room = length - around - SLACK
        tokens = tokenizer.encode(text, bos=False)
        if len(tokens) > room:
            half = (room - len(frame.line(CUT))) // 2
            if half < 1:
                raise ValueError(f"{where}: question and answer leave no room for a text in {length:,} tokens")
            text = f"{tokenizer.decode(tokens[:half])}{CUT}{tokenizer.decode(tokens[-half:])}"
    return PlacedSample({"instruction": f"{text}{end}", "output": answer}, where)
