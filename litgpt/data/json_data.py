"""Samples of one's own: JSON or JSONL files, or lists."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.data.base import SFTDataset, SFTModule
from litgpt.data.encoding import Sample, Splits
from litgpt.prompt_style import PromptStyle
from litgpt.settings import Settings
from litgpt.train.loss import IGNORE_INDEX

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
DEFAULT_FRACTION = 0.05


@dataclass(init=False)
class JSON(SFTModule):
    """Samples from a JSON file (a list), a JSONL file (one a line), or a folder with `train` and `val` files of these kinds.

    A sample has `instruction`, `output` and perhaps `input`; or it is a conversation: `messages` with `role` and `content`,
    or `conversations` with `from` and `value`. Conversations are rendered by the checkpoint's own chat template, unless a
    style other than Alpaca's is named, and only what the assistant says is learned, unless `mask_prompt` is false (default: of
    conversations true, of instructions false, as in LitGPT). Fields: see `SFTModule`.
    """

    json_path: Path

    def __init__(
        self,
        json_path: Path,
        mask_prompt: bool | None = None,
        val_split_fraction: float | None = None,
        prompt_style: str | PromptStyle = "alpaca",
        ignore_index: int = IGNORE_INDEX,
        seed: int = 42,
        num_workers: int = 4,
    ) -> None:
        self.json_path = Path(json_path)
        super().__init__(mask_prompt, val_split_fraction, prompt_style, ignore_index, seed, num_workers)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.json_path.exists():
            raise FileNotFoundError(f"The `json_path` must be a file or a directory: {self.json_path} does not exist")
        is_folder = self.json_path.is_dir()
        if is_folder and self.val_split_fraction is not None:
            raise ValueError(
                f"val_split_fraction should not be set for the folder {self.json_path}, which has a val file"
            )
        if not is_folder and self.val_split_fraction is None:
            self.val_split_fraction = DEFAULT_FRACTION
            warnings.warn(f"val_split_fraction is not given: {DEFAULT_FRACTION} of the samples validate", stacklevel=4)

    @property
    def val_dataset(self) -> SFTDataset | None:
        """`test_dataset`, by the name that it has in LitGPT here."""
        return self.test_dataset

    def samples(self) -> Splits:
        train, val = self.get_splits()
        has_conversations = any("messages" in sample for sample in [*train, *val])
        if self.mask_prompt is None:
            self.mask_prompt = has_conversations
        if has_conversations and type(self.prompt_style) is PromptStyle.styles["alpaca"]:
            self.use_own_style()
        return train, val

    def get_splits(self) -> Splits:
        """Training and validation samples."""
        if self.json_path.is_file():
            return self.split(read_samples(self.json_path))
        train, val = self.find_split("train"), self.find_split("val")  # both, before one is read
        return read_samples(train), read_samples(val)

    def find_split(self, split_name: str) -> Path:
        """The file of a split in the folder; `FileNotFoundError` if there is none."""
        for suffix in (".json", ".jsonl"):
            if (file := self.json_path / f"{split_name}{suffix}").is_file():
                return file
        names = f"{split_name}.json or {split_name}.jsonl"
        raise FileNotFoundError(f"json_path must be a file or a directory containing {names}: {self.json_path}")


@dataclass
class Samples(SFTModule):
    """Samples `given` as a list of mappings, as `JSON` reads them from a file. The prompt style is by default the model's own."""

    mask_prompt: bool = True
    prompt_style: str | PromptStyle | None = None
    given: Sequence[Sample] = field(default=(), repr=False)

    def samples(self) -> Splits:
        return self.split(checked({f"sample {i}": sample for i, sample in enumerate(self.given)}))


class PlacedSample(dict):
    """A sample that knows where it comes from, for error messages."""

    def __init__(self, sample: Sample, place: str) -> None:
        super().__init__(sample)
        self.place = place


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, conversations as `messages`; `ValueError` with the place and field of what is no sample."""
    found = checked({f"{path}, {place}": value for place, value in read_values(path).items()})
    if not found:
        raise ValueError(f"{path} holds no samples")
    return found


def checked(values: Mapping[str, Any]) -> list[Sample]:
    """Values, by their places, as samples."""
    found = []
    for place, value in values.items():
        if not isinstance(value, Mapping):
            kind = type(value).__name__
            raise ValueError(f"{place}: expected a mapping with 'instruction' and 'output', or 'messages', got {kind}")
        found.append(PlacedSample(_as_messages(value, place), place))
        _check(Settings(found[-1], place))
    return found


def _check(sample: Settings) -> None:
    """Raise `ValueError` for a field of the wrong type."""
    if "messages" not in sample:
        for name in ("instruction", "output"):
            sample.text(name)
        for name in ("input", "sys_prompt"):
            sample.text(name, None, null=True)
        return
    for i, values in enumerate(sample.value("messages", list[dict])):
        message = Settings(values, f"{sample.where}: messages[{i}]")
        message.only("role", ROLES, None, "messages")
        if message.text("role") == "assistant" and message.is_set("tool_calls"):
            message.text("content", None, null=True)
        else:
            message.text("content")


def read_values(path: Path) -> dict[str, Any]:
    """The values in a JSON file, a list, by "sample 0" and so on; or in a JSONL file, by "line 1". Only line feeds end lines."""
    text = _read_text(path)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return {f"line {i}": _parse(path, line, f"line {i}") for i, line in lines if line.strip()}
    values = _parse(path, text, None)
    if not isinstance(values, list):
        raise ValueError(f"{path} must hold a list of samples, got {type(values).__name__}")
    return {f"sample {i}": value for i, value in enumerate(values)}


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _parse(path: Path, text: str, place: str | None) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = place or (f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "")
        raise ValueError(f"{path}, {where}: not valid JSON: {getattr(error, 'msg', 'nested too deeply')}") from None


def _as_messages(sample: Sample, place: str) -> Sample:
    """A conversation with `from` and `value` as one with `role` and `content`."""
    if sample.get("conversations") is None:
        return sample
    turns = Settings(sample, place).value("conversations", list[dict])
    roles = (OTHER_ROLES.get(str(turn.get("from")), turn.get("from")) for turn in turns)
    messages = [{"role": role, "content": turn.get("value")} for role, turn in zip(roles, turns, strict=True)]
    return {**{name: value for name, value in sample.items() if name != "conversations"}, "messages": messages}
