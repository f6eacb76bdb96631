"""Deita: 10,000 conversations chosen for their quality (arXiv:2312.15685)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.base import SFTModule, has_own_split, samples_of_turns
from litgpt.data.download import load_hub_dataset
from litgpt.data.encoding import Splits


@dataclass(kw_only=True)
class Deita(SFTModule):
    """Conversations from the Hugging Face hub, each turn of which is a sample, or only the first. Fields: see `SFTModule`."""

    val_split_fraction: None = has_own_split()
    include_multiturn_conversations: bool = False
    download_dir: Path = Path("./data/deita")
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"

    def samples(self) -> Splits:
        parts = load_hub_dataset(self.repo_id, split=["train_sft", "test_sft"], cache_dir=self.download_dir)
        return tuple(format_dataset(parts[i], self.include_multiturn_conversations) for i in (0, 1))


def format_dataset(
    dataset: Iterable[Mapping[str, Any]], include_multi_turn_conversations: bool
) -> list[dict[str, str]]:
    """Samples of conversations whose `messages` alternate between user and assistant."""
    talks = ([message["content"] for message in entry["messages"]] for entry in dataset)
    return samples_of_turns(talks, include_multi_turn_conversations)
