"""Data modules: samples for fine-tuning, and texts for pretraining."""

from litgpt.data.alpaca import Alpaca as Alpaca
from litgpt.data.alpaca_2k import Alpaca2k as Alpaca2k
from litgpt.data.alpaca_gpt4 import AlpacaGPT4 as AlpacaGPT4
from litgpt.data.base import DataModule as DataModule
from litgpt.data.base import SFTDataset as SFTDataset
from litgpt.data.base import get_sft_collate_fn as get_sft_collate_fn
from litgpt.data.deita import Deita as Deita
from litgpt.data.flan import FLAN as FLAN
from litgpt.data.json_data import JSON as JSON
from litgpt.data.lima import LIMA as LIMA
from litgpt.data.lit_data import LitData as LitData
from litgpt.data.long_texts import LongTexts as LongTexts
from litgpt.data.longform import LongForm as LongForm
from litgpt.data.microllama import MicroLlama as MicroLlama
from litgpt.data.openwebtext import OpenWebText as OpenWebText
from litgpt.data.retrieval import Retrieval as Retrieval
from litgpt.data.text_files import TextFiles as TextFiles
from litgpt.data.tinyllama import TinyLlama as TinyLlama
from litgpt.data.tinystories import TinyStories as TinyStories
