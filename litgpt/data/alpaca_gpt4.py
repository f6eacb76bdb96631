"""Alpaca's instructions with answers of GPT-4."""

from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data.alpaca import Alpaca

_URL = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"


@dataclass(kw_only=True)
class AlpacaGPT4(Alpaca):
    """As `Alpaca`, with other answers."""

    val_split_fraction: float = 0.03847
    download_dir: Path = Path("./data/alpacagpt4")
    file_url: str = field(repr=False, default=_URL)
    file_name: str = field(repr=False, default="alpacagpt4_data_cleaned_archive.json")
