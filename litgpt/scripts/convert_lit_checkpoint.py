"""The command `convert_from_litgpt`, and LitGPT's functions that copy our weights into a state dict of Hugging Face."""

import shlex
import sys
from functools import partial
from pathlib import Path

from litgpt.checkpoint.export import save_huggingface
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.open import open_checkpoint
from litgpt.checkpoint.state_dicts import check_conversion_supported as check_conversion_supported
from litgpt.checkpoint.state_dicts import copy_all_from_litgpt, copy_from_litgpt
from litgpt.checkpoint.state_dicts import qkv_to_interleaved as qkv_reassemble  # noqa: F401
from litgpt.scripts.progress import weights_progress

PORT = 8000  # of `litgpt serve`

copy_weights_falcon = partial(copy_all_from_litgpt, "falcon")
copy_weights_gemma_2 = partial(copy_from_litgpt, "gemma_2")
copy_weights_gemma_3 = partial(copy_from_litgpt, "gemma_3")
copy_weights_gpt_neox = partial(copy_all_from_litgpt, "gpt_neox")
copy_weights_llama = partial(copy_from_litgpt, "llama")
copy_weights_olmo2 = partial(copy_from_litgpt, "olmo2")
copy_weights_phi = partial(copy_all_from_litgpt, "phi")
copy_weights_qwen_2_5 = partial(copy_from_litgpt, "qwen_2_5")
copy_weights_qwen_3 = partial(copy_from_litgpt, "qwen_3")


def convert_lit_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Convert a LitGPT checkpoint, or a GGUF file, to a Hugging Face checkpoint.

    Writes the files for `transformers.AutoModelForCausalLM.from_pretrained(output_dir)`: weights as safetensors in their
    original data type, config.json, generation_config.json and the tokenizer. Then says on stderr how other servers serve them
    under the name and at the port that `litgpt serve` has.

    Args:
        checkpoint_dir: Folder with lit_model.pth and model_config.yaml, a .gguf file, or any other checkpoint.
        output_dir: Folder to write to; must hold no weights yet.
    """
    checkpoint = open_checkpoint(find_checkpoint(checkpoint_dir))
    with weights_progress("Converting", checkpoint) as progress:
        save_huggingface(checkpoint, output_dir, progress=progress)
    print(output_dir)
    path = checkpoint.path.resolve()
    print(serving_commands(output_dir, (path if path.is_dir() else path.parent).name), file=sys.stderr)


def serving_commands(folder: Path, name: str) -> str:
    """Commands of vLLM, SGLang and llama.cpp that serve a Hugging Face folder."""
    path, name, file = shlex.quote(str(folder)), shlex.quote(name), shlex.quote(f"{name}-converted.gguf")
    return f"""To serve it by
  vLLM:       vllm serve {path} --served-model-name {name} --port {PORT}
  SGLang:     python -m sglang.launch_server --model-path {path} --served-model-name {name} --port {PORT}
  llama.cpp:  python convert_hf_to_gguf.py {path} --outfile {file} && llama-server -m {file} --alias {name} --port {PORT}"""
