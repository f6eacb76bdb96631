"""The command `litgpt generate_adapter_v2`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.generate.finetuned import FinetunedOptions, answer_finetuned, positions
from litgpt.generate.options import command, option


@dataclass(frozen=True, kw_only=True)
class AdapterV2Options(FinetunedOptions):
    """The options of `litgpt generate_adapter_v2`."""

    adapter_path: Path = option(
        Path("out/finetune/adapter-v2/final/lit_model.pth.adapter_v2"), "File of the adapter's weights, or its folder."
    )


@command(AdapterV2Options, *positions("adapter_path"))
def main(options: AdapterV2Options) -> None:
    """Answer a prompt with the weights of an adapter of the second kind.

    The answer goes to stdout, what it cost to stderr.
    """
    answer_finetuned(options, options.adapter_path, "adapter_v2")
