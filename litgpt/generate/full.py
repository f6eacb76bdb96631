"""The command `litgpt generate_full`."""

from litgpt.generate.finetuned import finetuned_command

main = finetuned_command(
    "full",
    "Answer a prompt with a model all of whose weights were fine-tuned.",
    "finetuned_path",
    "out/full/alpaca/lit_model_finetuned.pth",
    "File of the fine-tuned weights, or the folder that holds it as lit_model.pth.",
)
