"""The command `litgpt generate_lora`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.generate.finetuned import FinetunedOptions, answer_finetuned, positions
from litgpt.generate.options import command, option


@dataclass(frozen=True, kw_only=True)
class LoraOptions(FinetunedOptions):
    """The options of `litgpt generate_lora`."""

    lora_path: Path = option(
        Path("out/finetune/lora/final/lit_model.pth.lora"), "File of the LoRA weights, or its folder."
    )


@command(LoraOptions, *positions("lora_path"))
def main(options: LoraOptions) -> None:
    """Answer a prompt with LoRA weights that were not merged.

    The answer goes to stdout, what it cost to stderr.
    """
    answer_finetuned(options, options.lora_path, "lora")
