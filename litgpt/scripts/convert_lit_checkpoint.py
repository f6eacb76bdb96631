"""The command `convert_from_litgpt`."""

from pathlib import Path

from litgpt.checkpoint.export import save_huggingface
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.open import open_checkpoint
from litgpt.scripts.progress import weights_progress


def convert_lit_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Turn a LitGPT checkpoint, or a GGUF file, into a Hugging Face one.

    `output_dir` gets what `transformers.AutoModelForCausalLM.from_pretrained(output_dir)` loads: weights as
    safetensors in their original data type, config.json, generation_config.json and the tokenizer.

    Args:
        checkpoint_dir: Folder with lit_model.pth and model_config.yaml, a .gguf file, or any other checkpoint.
        output_dir: Folder to write to; must hold no weights yet.
    """
    checkpoint = open_checkpoint(find_checkpoint(checkpoint_dir))
    total = sum(piece.nbytes for _, _, piece in checkpoint.pieces(meta=True))
    with weights_progress(f"Converting {checkpoint.name}", total) as progress:
        save_huggingface(checkpoint, output_dir, progress=progress)
    print(output_dir)
