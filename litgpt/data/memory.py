"""Samples that are in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from litgpt.data.base import IGNORE_INDEX, SFTDataset, SFTModule
from litgpt.data.encoding import sample_problem
from litgpt.prompt_style import PromptStyle


@dataclass
class Samples(SFTModule):
    """Samples given as a list of mappings, as `JSON` reads them from a file.

    Attributes:
        samples: the samples.
        mask_prompt, prompt_style, ignore_index, seed: as for `JSON`; the style is by default the model's own.
        val_split_fraction: part of the samples that validate.
    """

    samples: Sequence[Mapping[str, Any]] = field(repr=False)
    mask_prompt: bool = True
    val_split_fraction: float = 0.0
    prompt_style: str | PromptStyle | None = None
    ignore_index: int = IGNORE_INDEX
    seed: int = 42
    train_dataset: SFTDataset | None = field(default=None, init=False, repr=False)
    val_dataset: SFTDataset | None = field(default=None, init=False, repr=False)

    def setup(self, stage: str = "") -> None:
        for i, sample in enumerate(self.samples):
            if problem := sample_problem(sample):
                raise ValueError(f"sample {i}: {problem}")
        if self.prompt_style is None:
            self.prompt_style = self.own_style()
        train, val = self.split(self.samples, self.val_split_fraction)
        self.train_dataset, self.val_dataset = self.dataset(train), self.dataset(val)
