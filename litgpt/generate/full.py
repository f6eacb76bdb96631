"""The command `litgpt generate_full`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.generate.finetuned import FinetunedOptions, answer_finetuned, positions
from litgpt.generate.options import command, option


@dataclass(frozen=True, kw_only=True)
class FullOptions(FinetunedOptions):
    """The options of `litgpt generate_full`."""

    finetuned_path: Path = option(
        Path("out/full/alpaca/lit_model_finetuned.pth"),
        "File of the fine-tuned weights, or the folder that holds it as lit_model.pth.",
    )


@command(FullOptions, *positions("finetuned_path"))
def main(options: FullOptions) -> None:
    """Answer a prompt with a model all of whose weights were fine-tuned.

    The answer goes to stdout, what it cost to stderr.
    """
    answer_finetuned(options, options.finetuned_path, "full")
