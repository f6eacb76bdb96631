"""Samples that are in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from litgpt.data.base import SFTModule
from litgpt.data.encoding import Sample, Splits, sample_problem
from litgpt.prompt_style import PromptStyle


@dataclass
class Samples(SFTModule):
    """Samples `given` as a list of mappings, as `JSON` reads them from a file. The prompt style is by default the model's own.
    Fields: see `SFTModule`."""

    given: Sequence[Sample] = field(repr=False)
    mask_prompt: bool = field(default=True, kw_only=True)
    prompt_style: str | PromptStyle | None = field(default=None, kw_only=True)

    def samples(self) -> Splits:
        for i, sample in enumerate(self.given):
            if problem := sample_problem(sample):
                raise ValueError(f"sample {i}: {problem}")
        return self.split(self.given)
