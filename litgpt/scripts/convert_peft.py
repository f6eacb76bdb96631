"""The commands `convert_to_peft` and `convert_from_peft`."""

from pathlib import Path

from litgpt.checkpoint.peft import load_peft, save_peft


def convert_to_peft(checkpoint_dir: Path, output_dir: Path, pretrained_checkpoint_dir: Path | None = None) -> None:
    """Convert LoRA weights to Hugging Face's PEFT format, which `PeftModel.from_pretrained` loads.

    Args:
        checkpoint_dir: Folder with lit_model.pth.lora and hyperparameters.yaml, written by fine-tuning.
        output_dir: Folder to write adapter_config.json and adapter_model.safetensors to.
        pretrained_checkpoint_dir: The checkpoint that was fine-tuned: a folder, a .gguf file, or a model's name. Default:
            the one in hyperparameters.yaml.
    """
    save_peft(checkpoint_dir, output_dir, pretrained_checkpoint_dir)
    print(output_dir)


def convert_from_peft(checkpoint_dir: Path, output_dir: Path, pretrained_checkpoint_dir: Path | None = None) -> None:
    """Convert PEFT's LoRA weights to a folder for `chat`, `generate_lora` and `merge_lora`.

    Args:
        checkpoint_dir: Folder with adapter_config.json and adapter_model.safetensors.
        output_dir: Folder to write lit_model.pth.lora and hyperparameters.yaml to.
        pretrained_checkpoint_dir: The checkpoint that the weights are for: a folder, a .gguf file, or a model's name.
            Default: the one in adapter_config.json.
    """
    load_peft(checkpoint_dir, output_dir, pretrained_checkpoint_dir)
    print(output_dir)
