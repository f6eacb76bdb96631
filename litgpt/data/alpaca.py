"""Alpaca: 52,000 instructions written by a language model, cleaned."""

from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data.base import SFTModule
from litgpt.data.download import download_if_missing
from litgpt.data.encoding import Splits
from litgpt.data.json_data import read_samples

_URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"


@dataclass(kw_only=True)
class Alpaca(SFTModule):
    """Samples of a JSON file that is fetched once. Fields: see `SFTModule`; `file_url` and `file_name` say which file."""

    val_split_fraction: float = 0.03865
    download_dir: Path = Path("./data/alpaca")
    file_url: str = field(repr=False, default=_URL)
    file_name: str = field(repr=False, default="alpaca_data_cleaned_archive.json")

    def prepare_data(self) -> None:
        download_if_missing(Path(self.download_dir) / self.file_name, self.file_url)

    def samples(self) -> Splits:
        return self.split(read_samples(Path(self.download_dir) / self.file_name))
