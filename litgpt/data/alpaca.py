"""Alpaca: 52,000 instructions written by a language model, cleaned."""

from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data.base import IGNORE_INDEX, SFTDataset, SFTModule
from litgpt.data.download import download_if_missing
from litgpt.data.json_data import read_samples
from litgpt.prompt_style import PromptStyle

_URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"


@dataclass
class Alpaca(SFTModule):
    """Samples of a JSON file that is fetched once. Fields: see `JSON`; `file_url` and `file_name` say which file."""

    mask_prompt: bool = False
    val_split_fraction: float = 0.03865
    prompt_style: str | PromptStyle = "alpaca"
    ignore_index: int = IGNORE_INDEX
    seed: int = 42
    num_workers: int = 4
    download_dir: Path = Path("./data/alpaca")
    file_url: str = field(repr=False, default=_URL)
    file_name: str = field(repr=False, default="alpaca_data_cleaned_archive.json")
    train_dataset: SFTDataset | None = field(default=None, init=False, repr=False)
    test_dataset: SFTDataset | None = field(default=None, init=False, repr=False)

    def prepare_data(self) -> None:
        download_if_missing(Path(self.download_dir) / self.file_name, self.file_url)

    def setup(self, stage: str = "") -> None:
        train, test = self.split(read_samples(Path(self.download_dir) / self.file_name), self.val_split_fraction)
        self.train_dataset, self.test_dataset = self.dataset(train), self.dataset(test)
