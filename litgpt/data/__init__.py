"""Data modules: samples for fine-tuning, and texts for pretraining."""

from litgpt.data.alpaca import Alpaca
from litgpt.data.alpaca_2k import Alpaca2k
from litgpt.data.alpaca_gpt4 import AlpacaGPT4
from litgpt.data.base import DataModule, SFTDataset, get_sft_collate_fn
from litgpt.data.deita import Deita
from litgpt.data.flan import FLAN
from litgpt.data.json_data import JSON
from litgpt.data.lima import LIMA
from litgpt.data.lit_data import LitData
from litgpt.data.long_texts import LongTexts
from litgpt.data.longform import LongForm
from litgpt.data.microllama import MicroLlama
from litgpt.data.openwebtext import OpenWebText
from litgpt.data.retrieval import Retrieval
from litgpt.data.text_files import TextFiles
from litgpt.data.tinyllama import TinyLlama
from litgpt.data.tinystories import TinyStories

__all__ = [
    "FLAN",
    "JSON",
    "LIMA",
    "Alpaca",
    "Alpaca2k",
    "AlpacaGPT4",
    "DataModule",
    "Deita",
    "LitData",
    "LongForm",
    "LongTexts",
    "MicroLlama",
    "OpenWebText",
    "Retrieval",
    "SFTDataset",
    "TextFiles",
    "TinyLlama",
    "TinyStories",
    "get_sft_collate_fn",
]
