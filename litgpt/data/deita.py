"""Deita: 10,000 conversations chosen for their quality (arXiv:2312.15685)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.data.base import IGNORE_INDEX, SFTDataset, SFTModule
from litgpt.data.download import load_hub_dataset
from litgpt.prompt_style import PromptStyle


@dataclass
class Deita(SFTModule):
    """Conversations from the Hugging Face hub, each turn of which is a sample, or only the first. Fields: see `JSON`."""

    mask_prompt: bool = False
    prompt_style: str | PromptStyle = "alpaca"
    ignore_index: int = IGNORE_INDEX
    seed: int = 42
    num_workers: int = 4
    include_multiturn_conversations: bool = False
    download_dir: Path = Path("./data/deita")
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    train_dataset: SFTDataset | None = field(default=None, init=False, repr=False)
    test_dataset: SFTDataset | None = field(default=None, init=False, repr=False)

    def prepare_data(self) -> None:
        self._load()

    def setup(self, stage: str = "") -> None:
        train, test = (format_dataset(part, self.include_multiturn_conversations) for part in self._load())
        self.train_dataset, self.test_dataset = self.dataset(train), self.dataset(test)

    def _load(self) -> Any:
        return load_hub_dataset(self.repo_id, split=["train_sft", "test_sft"], cache_dir=self.download_dir)


def format_dataset(
    dataset: Iterable[Mapping[str, Any]], include_multi_turn_conversations: bool
) -> list[dict[str, str]]:
    """Samples of conversations whose `messages` alternate between user and assistant."""
    return [
        sample
        for entry in dataset
        for sample in pairs([message["content"] for message in entry["messages"]], include_multi_turn_conversations)
    ]


def pairs(texts: list[str], all_turns: bool) -> list[dict[str, str]]:
    """Samples of texts that alternate between user and assistant: of the first turn, or of all."""
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    return [
        {"instruction": said, "input": "", "output": answer} for said, answer in (turns if all_turns else turns[:1])
    ]
