"""Data modules: samples for fine-tuning, and texts for pretraining."""

from litgpt.data.base import DataModule, SFTDataset, SFTModule, get_sft_collate_fn
from litgpt.data.json_data import JSON

__all__ = ["JSON", "DataModule", "SFTDataset", "SFTModule", "get_sft_collate_fn"]
