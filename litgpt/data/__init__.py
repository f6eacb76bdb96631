"""Data modules: samples for fine-tuning, and texts for pretraining."""

from litgpt.data.base import DataModule as DataModule
from litgpt.data.base import SFTDataset as SFTDataset
from litgpt.data.base import get_sft_collate_fn as get_sft_collate_fn
from litgpt.data.instruction_sets import FLAN as FLAN
from litgpt.data.instruction_sets import LIMA as LIMA
from litgpt.data.instruction_sets import Alpaca as Alpaca
from litgpt.data.instruction_sets import Alpaca2k as Alpaca2k
from litgpt.data.instruction_sets import AlpacaGPT4 as AlpacaGPT4
from litgpt.data.instruction_sets import Deita as Deita
from litgpt.data.instruction_sets import LongForm as LongForm
from litgpt.data.json_data import JSON as JSON
from litgpt.data.lit_data import LitData as LitData
from litgpt.data.lit_data import MicroLlama as MicroLlama
from litgpt.data.lit_data import TinyLlama as TinyLlama
from litgpt.data.long_texts import LongTexts as LongTexts
from litgpt.data.openwebtext import OpenWebText as OpenWebText
from litgpt.data.retrieval import Retrieval as Retrieval
from litgpt.data.text_files import TextFiles as TextFiles
from litgpt.data.tinystories import TinyStories as TinyStories
