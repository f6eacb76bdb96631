"""LIMA: 1,000 careful answers (arXiv:2305.11206)."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from litgpt.data.base import IGNORE_INDEX, SFTDataset, SFTModule
from litgpt.data.deita import pairs
from litgpt.data.download import load_hub_dataset
from litgpt.prompt_style import PromptStyle


@dataclass
class LIMA(SFTModule):
    """Samples from the Hugging Face hub, which asks for an access token. Fields: see `JSON`."""

    mask_prompt: bool = False
    val_split_fraction: float = 0.1
    prompt_style: str | PromptStyle = "alpaca"
    ignore_index: int = IGNORE_INDEX
    seed: int = 42
    num_workers: int = 4
    include_multiturn_conversations: bool = False
    repo_id: str = "GAIR/lima"
    access_token: str | None = field(repr=False, default_factory=lambda: os.getenv("HF_TOKEN"))
    train_dataset: SFTDataset | None = field(default=None, init=False, repr=False)
    test_dataset: SFTDataset | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.access_token is None:
            raise ValueError("LIMA needs an access token of the Hugging Face hub: set HF_TOKEN, or --data.access_token")

    def prepare_data(self) -> None:
        load_hub_dataset(self.repo_id, token=self.access_token)

    def setup(self, stage: str = "") -> None:
        data = load_hub_dataset(self.repo_id, token=self.access_token)["train"]
        train, test = self.split(format_dataset(data, self.include_multiturn_conversations), self.val_split_fraction)
        self.train_dataset, self.test_dataset = self.dataset(train), self.dataset(test)


def format_dataset(
    dataset_partition: Iterable[Mapping[str, Any]], include_multi_turn_conversations: bool
) -> list[dict[str, str]]:
    """Samples of `conversations`, texts that alternate between user and assistant."""
    return [
        sample
        for entry in dataset_partition
        for sample in pairs(entry["conversations"], include_multi_turn_conversations)
    ]
