"""Opens a checkpoint of any kind."""

from pathlib import Path

from litgpt.checkpoint.base import CONFIG_NAME, QUANTIZED_NAME, WEIGHTS_NAME, Checkpoint
from litgpt.checkpoint.huggingface import HuggingFaceCheckpoint, holds_weights
from litgpt.checkpoint.litgpt_folder import LitGPTCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder in the layout of Hugging Face or LitGPT, one that `litgpt quantize` or a fine-tuning with LoRA wrote, a
    `.gguf` file or any shard of a split one, or a folder with one model in `.gguf` files.

    Raises `FileNotFoundError` if there is no model at `path`, `ValueError` if it cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist: give a checkpoint folder, a .gguf file or a model name")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{str(path)!r} is a file but no .gguf file: give the folder that holds the checkpoint")
        return _open_gguf(path)
    if (path / WEIGHTS_NAME).is_file():
        return LitGPTCheckpoint(path)
    if (path / QUANTIZED_NAME).is_file():
        from litgpt.checkpoint.quantized_folder import QuantizedCheckpoint

        return QuantizedCheckpoint(path)
    if (path / f"{WEIGHTS_NAME}.lora").is_file():
        return open_lora(path)
    for method in ("adapter", "adapter_v2"):
        if (path / f"{WEIGHTS_NAME}.{method}").is_file():
            raise ValueError(f"{path} holds an adapter without its model: use `litgpt generate_{method}`")
    if holds_weights(path):
        return HuggingFaceCheckpoint(path)
    from litgpt.checkpoint.gguf_file import gguf_models

    gguf_files = gguf_models(path)
    if len(gguf_files) == 1:
        return _open_gguf(gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files)
        raise ValueError(f"{str(path)!r} holds several .gguf files ({names}): give the path of one")
    if (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is incomplete: it holds {CONFIG_NAME} but no weights, as after a command that was interrupted; "
            "run that again"
        )
    raise FileNotFoundError(
        f"{str(path)!r} holds no weights: expected {WEIGHTS_NAME}, *.safetensors, pytorch_model*.bin or one .gguf file"
    )


def open_lora(path: Path, base: Path | None = None) -> Checkpoint:
    """LoRA weights (their folder or file) merged into `base`, by default the checkpoint in the hyperparameters."""
    from litgpt.checkpoint.find import find_checkpoint
    from litgpt.checkpoint.finetuned import Finetuned, LoRACheckpoint

    finetuned = Finetuned(path, "lora")
    return LoRACheckpoint(finetuned, open_checkpoint(find_checkpoint(finetuned.base(base))))


def _open_gguf(path: Path) -> Checkpoint:
    from litgpt.checkpoint.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)
