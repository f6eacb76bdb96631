"""The command `litgpt generate_adapter_v2`."""

from litgpt.generate.finetuned import finetuned_command

main = finetuned_command(
    "adapter_v2",
    "Answer a prompt with the weights of an adapter of the second kind.",
    "adapter_path",
    "out/finetune/adapter-v2/final/lit_model.pth.adapter_v2",
    "File of the adapter's weights, or its folder.",
)
