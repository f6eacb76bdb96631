"""Training: one loop for fine-tuning and pretraining, and its parts."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "finetune":
        from litgpt.train.finetuning import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
