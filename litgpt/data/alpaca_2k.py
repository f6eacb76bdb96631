"""Two thousand samples of Alpaca."""

from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data.alpaca import Alpaca
from litgpt.data.download import load_hub_dataset
from litgpt.data.encoding import Splits


@dataclass(kw_only=True)
class Alpaca2k(Alpaca):
    """As `Alpaca`, from the Hugging Face hub."""

    val_split_fraction: float = 0.05
    download_dir: Path = Path("./data/alpaca2k")
    repo_id: str = field(repr=False, default="mhenrichsen/alpaca_2k_test")
    file_name: str = field(repr=False, default="alpaca2k_data_cleaned_archive.json")

    def prepare_data(self) -> None:
        self.samples()

    def samples(self) -> Splits:
        data = load_hub_dataset(self.repo_id, cache_dir=self.download_dir)["train"]
        parts = data.train_test_split(test_size=self.val_split_fraction, seed=self.seed)
        return parts["train"], parts["test"]
