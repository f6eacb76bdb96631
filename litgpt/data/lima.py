"""LIMA: 1,000 careful answers (arXiv:2305.11206)."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from litgpt.data.base import SFTModule, samples_of_turns
from litgpt.data.download import load_hub_dataset
from litgpt.data.encoding import Splits


@dataclass(kw_only=True)
class LIMA(SFTModule):
    """Samples from the Hugging Face hub, which asks for an access token. Fields: see `SFTModule`."""

    val_split_fraction: float = 0.1
    include_multiturn_conversations: bool = False
    repo_id: str = "GAIR/lima"
    access_token: str | None = field(repr=False, default_factory=lambda: os.getenv("HF_TOKEN"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.access_token is None:
            raise ValueError("LIMA needs an access token of the Hugging Face hub: set HF_TOKEN, or --data.access_token")

    def samples(self) -> Splits:
        data = load_hub_dataset(self.repo_id, token=self.access_token)["train"]
        return self.split(format_dataset(data, self.include_multiturn_conversations))


def format_dataset(
    dataset_partition: Iterable[Mapping[str, Any]], include_multi_turn_conversations: bool
) -> list[dict[str, str]]:
    """Samples of `conversations`, texts that alternate between user and assistant."""
    talks = (entry["conversations"] for entry in dataset_partition)
    return samples_of_turns(talks, include_multi_turn_conversations)
