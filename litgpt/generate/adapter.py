"""The command `litgpt generate_adapter`."""

from litgpt.generate.finetuned import finetuned_command

main = finetuned_command(
    "adapter",
    "Answer a prompt with the weights of an adapter.",
    "adapter_path",
    "out/finetune/adapter/final/lit_model.pth.adapter",
    "File of the adapter's weights, or its folder.",
)
