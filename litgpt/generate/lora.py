"""The command `litgpt generate_lora`."""

from litgpt.generate.finetuned import finetuned_command

main = finetuned_command(
    "lora",
    "Answer a prompt with LoRA weights that were not merged.",
    "lora_path",
    "out/finetune/lora/final/lit_model.pth.lora",
    "File of the LoRA weights, or its folder.",
)
