"""The command `merge_lora`."""

from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.base import WEIGHTS_NAME
from litgpt.checkpoint.load import save_litgpt
from litgpt.checkpoint.open import open_lora
from litgpt.engine.loading import parse_precision
from litgpt.settings import Settings, read_yaml


def merge_lora(
    checkpoint_dir: Path, pretrained_checkpoint_dir: Path | None = None, precision: str | None = None
) -> None:
    """Merge LoRA weights into the weights of the checkpoint that was fine-tuned.

    The folder of the LoRA weights becomes a LitGPT checkpoint for all other commands.

    Args:
        checkpoint_dir: Folder with lit_model.pth.lora and hyperparameters.yaml, written by fine-tuning.
        pretrained_checkpoint_dir: The checkpoint that was fine-tuned: a folder, a .gguf file, or a model's name. Default:
            the one in hyperparameters.yaml.
        precision: Precision of the merged weights: bf16-true, 16-true or 32-true. Default: the precision of the
            fine-tuning.
    """
    checkpoint = open_lora(checkpoint_dir, pretrained_checkpoint_dir)
    folder = checkpoint.path
    if (folder / WEIGHTS_NAME).exists():
        print(f"LoRA weights have already been merged: delete {folder / WEIGHTS_NAME} to merge again")
        return
    dtype = None if precision is None else parse_precision(precision, torch.device("cpu"))
    save_litgpt(checkpoint, folder, dtype=dtype)
    print(folder / WEIGHTS_NAME)


def load_lora_metadata(checkpoint_dir: Path) -> tuple[dict[str, Any], Path, str | None]:
    """The `lora_*` settings, the checkpoint that was fine-tuned and the precision, from a folder's `hyperparameters.yaml`."""
    file = Path(checkpoint_dir) / "hyperparameters.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"{checkpoint_dir} is missing a `hyperparameters.yaml` file: give a folder that fine-tuning wrote"
        )
    values = read_yaml(file)
    settings = {key: value for key, value in values.items() if key.startswith("lora_")}
    found = Settings(values, str(file))
    return settings, Path(found.text("checkpoint_dir")), found.text("precision", None, null=True)
