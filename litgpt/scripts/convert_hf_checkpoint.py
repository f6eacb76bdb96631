"""The command `convert_to_litgpt`, and LitGPT's functions that copy Hugging Face's weights into a state dict."""

from functools import partial
from pathlib import Path

from litgpt.checkpoint.base import WEIGHTS_NAME, Checkpoint
from litgpt.checkpoint.files import parse_dtype
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.huggingface import HuggingFaceCheckpoint, holds_weights
from litgpt.checkpoint.load import save_litgpt
from litgpt.checkpoint.open import open_checkpoint
from litgpt.checkpoint.state_dicts import copy_to_litgpt, copy_to_litgpt_by_shape, copy_whole_to_litgpt
from litgpt.checkpoint.state_dicts import layer_template as layer_template
from litgpt.checkpoint.state_dicts import load_param as load_param
from litgpt.checkpoint.state_dicts import qkv_from_interleaved as qkv_reassemble  # noqa: F401
from litgpt.config import Config
from litgpt.scripts.progress import weights_progress

copy_weights_falcon = partial(copy_whole_to_litgpt, "falcon")
copy_weights_gemma_2 = partial(copy_to_litgpt_by_shape, "gemma_2")
copy_weights_gemma_3 = partial(copy_to_litgpt_by_shape, "gemma_3")
copy_weights_gpt_neox = partial(copy_whole_to_litgpt, "gpt_neox")
copy_weights_hf_llama = partial(copy_to_litgpt, "llama")
copy_weights_olmo2 = partial(copy_to_litgpt, "olmo2")
copy_weights_phi = partial(copy_to_litgpt, "phi")
copy_weights_qwen_2_5 = partial(copy_to_litgpt, "qwen_2_5")
copy_weights_qwen_3 = partial(copy_to_litgpt, "qwen_3")


def convert_hf_checkpoint(
    checkpoint_dir: Path,
    *,
    model_name: str | None = None,
    dtype: str | None = None,
    debug_mode: bool | None = False,
) -> None:
    """Convert a Hugging Face checkpoint, or a GGUF file, to a LitGPT checkpoint in the same folder.

    Writes `lit_model.pth` and `model_config.yaml`, which LitGPT loads too. No other command needs it: all of them open
    Hugging Face folders and GGUF files directly.

    Args:
        checkpoint_dir: Folder with config.json and weights, or a .gguf file.
        model_name: Name of the architecture to read the weights as, instead of the one in config.json.
        dtype: Data type to write, say bfloat16, instead of the stored one.
        debug_mode: Print every weight instead of a progress bar.
    """
    path = find_checkpoint(checkpoint_dir)
    checkpoint = _open(path, model_name)
    out_dir = path if path.is_dir() else path.parent
    with weights_progress("Converting", checkpoint, names=bool(debug_mode)) as progress:
        save_litgpt(checkpoint, out_dir, dtype=None if dtype is None else parse_dtype(dtype), progress=progress)
    print(out_dir / WEIGHTS_NAME)


def _open(path: Path, model_name: str | None) -> Checkpoint:
    if not path.is_dir() or not holds_weights(path):
        return open_checkpoint(path)
    if model_name is not None:
        return HuggingFaceCheckpoint(path, Config.from_name(model_name))
    if (path / "config.json").is_file():
        return HuggingFaceCheckpoint(path)
    try:
        config = Config.from_name(path.resolve().name)
    except ValueError:
        raise FileNotFoundError(
            f"{path} holds no config.json and has no known model's name: give --model_name"
        ) from None
    return HuggingFaceCheckpoint(path, config)
