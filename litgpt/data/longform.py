"""LongForm: long texts, with instructions that a model found for them (arXiv:2304.08460)."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.base import SFTModule, has_own_split
from litgpt.data.download import download_if_missing
from litgpt.data.encoding import Splits
from litgpt.data.json_data import read_values
from litgpt.prompt_style import PromptStyle

_URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"


@dataclass(kw_only=True)
class LongForm(SFTModule):
    """Samples of two JSON files that are fetched once. Fields: see `SFTModule`."""

    val_split_fraction: None = has_own_split()
    prompt_style: str | PromptStyle = "longform"
    download_dir: Path = Path("./data/longform")

    def prepare_data(self) -> None:
        for name in ("train.json", "val.json"):
            download_if_missing(Path(self.download_dir) / name, f"{_URL}/{name}")

    def samples(self) -> Splits:
        files = (Path(self.download_dir) / name for name in ("train.json", "val.json"))
        train, val = (
            [{"instruction": row["input"], "output": row["output"]} for row in read_values(file).values()]
            for file in files
        )
        return train, val
