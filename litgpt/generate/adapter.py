"""The command `litgpt generate_adapter`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.generate.finetuned import FinetunedOptions, answer_finetuned, positions
from litgpt.generate.options import command, option


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(FinetunedOptions):
    """The options of `litgpt generate_adapter`."""

    adapter_path: Path = option(
        Path("out/finetune/adapter/final/lit_model.pth.adapter"), "File of the adapter's weights, or its folder."
    )


@command(AdapterOptions, *positions("adapter_path"))
def main(options: AdapterOptions) -> None:
    """Answer a prompt with the weights of an adapter.

    The answer goes to stdout, what it cost to stderr.
    """
    answer_finetuned(options, options.adapter_path, "adapter")
