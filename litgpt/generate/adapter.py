"""The command `litgpt generate_adapter`."""

from pathlib import Path
from typing import Literal

from litgpt.engine.loading import Quantization
from litgpt.generate.base import main as generate
from litgpt.generate.finetuned import Finetuned, answer, explained_by


@explained_by(generate)
def main(
    checkpoint_dir: Path | None = None,
    prompt: str = "What food do llamas eat?",
    input: str = "",
    sys_prompt: str | None = None,
    adapter_path: Path = Path("out/finetune/adapter/final/lit_model.pth.adapter"),
    quantize: Quantization | None = None,
    max_new_tokens: int = 100,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: str | None = None,
    *,
    compile: bool = False,
    kv_cache: Literal["dense", "lastrec"] = "dense",
    cache_length: int | None = None,
    sinks: int = 0,
    prompt_chunksize: int | None = None,
    seed: int = 1234,
) -> None:
    """Answer a prompt with the weights of an adapter.

    The answer goes to stdout, what it cost to stderr.

    Args:
        checkpoint_dir: The checkpoint that was fine-tuned: a folder, a .gguf file, or a model's name. Default: the one that
            hyperparameters.yaml, next to the weights, names.
        input: What the prompt is about, where the prompt style has a place for it (Alpaca).
        adapter_path: File of the adapter's weights, or its folder.
    """
    options = locals()
    answer(Finetuned(options.pop("adapter_path"), "adapter"), **options)
