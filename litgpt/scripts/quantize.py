"""The command `quantize`."""

from pathlib import Path
from typing import Literal

from litgpt.checkpoint.base import QUANTIZED_NAME
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import save_quantized
from litgpt.checkpoint.open import open_checkpoint
from litgpt.runners.quantized_weights import Scheme
from litgpt.scripts.progress import weights_progress


def quantize_checkpoint(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    quantize: Literal["int8", "int4"] = "int4",
    group_size: int = 32,
) -> None:
    """Quantise a model's weights once, into a folder that all other commands open.

    Needs little memory: weights are read, quantised and written one after the other.

    Args:
        checkpoint_dir: Folder of a checkpoint (Hugging Face or LitGPT), a .gguf file, or a model's name.
        out_dir: Folder to write, which must not hold weights of another kind.
        quantize: Bits of a weight: int8 is nearly exact, int4 half as large.
        group_size: Weights that share a scale in int4: 32, 64 or 128. More is smaller and less exact.
    """
    how = Scheme(quantize, group_size)
    checkpoint = open_checkpoint(find_checkpoint(checkpoint_dir))
    with weights_progress("Quantising", checkpoint) as progress:
        save_quantized(checkpoint, out_dir, how, progress=progress)
    print(out_dir / QUANTIZED_NAME)
