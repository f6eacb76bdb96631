"""LongForm: long texts, with instructions that a model found for them (arXiv:2304.08460)."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data.base import IGNORE_INDEX, SFTDataset, SFTModule
from litgpt.data.download import download_if_missing
from litgpt.prompt_style import PromptStyle

_URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"


@dataclass
class LongForm(SFTModule):
    """Samples of two JSON files that are fetched once. Fields: see `JSON`."""

    mask_prompt: bool = False
    prompt_style: str | PromptStyle = "longform"
    ignore_index: int = IGNORE_INDEX
    seed: int = 42
    num_workers: int = 4
    download_dir: Path = Path("./data/longform")
    train_dataset: SFTDataset | None = field(default=None, init=False, repr=False)
    test_dataset: SFTDataset | None = field(default=None, init=False, repr=False)

    def prepare_data(self) -> None:
        for split in ("train", "val"):
            download_if_missing(Path(self.download_dir) / f"{split}.json", f"{_URL}/{split}.json")

    def setup(self, stage: str = "") -> None:
        self.train_dataset, self.test_dataset = (
            self.dataset(
                json.loads((Path(self.download_dir) / f"{split}.json").read_text(encoding="utf-8")), _transform
            )
            for split in ("train", "val")
        )


def _transform(item: dict[str, str]) -> dict[str, str]:
    return {"instruction": item["input"], "output": item["output"]}
