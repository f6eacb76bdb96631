"""`litgpt generate_sequentially`: the layers of a model on several devices (`litgpt.parallel.pipeline`)."""

import sys
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.engine.loading import Quantization, choose_kv_caches, make_ready
from litgpt.engine.sampling import Sampling
from litgpt.generate.base import check_options, print_answers
from litgpt.model import GPT
from litgpt.parallel.pipeline import choose_devices, load_spread, spread_layers
from litgpt.parallel.tensor import chunk_sizes
from litgpt.prompts import encode_prompt

__all__ = ["chunk_sizes", "layer_to_device", "main", "replace_device", "sequential"]


@torch.inference_mode()
def sequential(model: GPT, root: torch.device, max_seq_length: int, devices: int) -> GPT:
    """Spread the layers of a model over the first `devices` devices of the kind of `root`, and give it caches of
    `max_seq_length` tokens for one row. See `litgpt.parallel.pipeline.spread_layers`.

    Raises:
        ValueError: if there are more devices than layers, or none, or the model was spread before.
    """
    root = torch.device(root)
    if devices > model.config.n_layer:
        raise ValueError(
            "The number of layers in the model must be larger than the number of devices, but got "
            f"n_layer={model.config.n_layer} and devices={devices}."
        )
    kinds = [torch.device("cpu") if root.type == "cpu" else torch.device(root.type, i) for i in range(devices)]
    spread_layers(model, kinds)
    model.max_seq_length = max_seq_length
    model.set_kv_caches(1, max_seq_length=max_seq_length)
    return model


def layer_to_device(module: nn.Module, chunk_on: type[nn.Module], chunk_sizes: list[int]) -> dict[str, int]:
    """The names of all submodules of the kind `chunk_on`, in order, and the number of the device of each: the first
    `chunk_sizes[0]` are on device 0, and so on.

    Raises:
        ValueError: if `chunk_sizes` do not add up to their number.
    """
    names = [name for name, submodule in module.named_modules() if isinstance(submodule, chunk_on)]
    numbers = [number for number, size in enumerate(chunk_sizes) for _ in range(size)]
    if len(names) != len(numbers):
        raise ValueError(f"Found {len(names)} for chunk_on={chunk_on}, not covered by chunk_sizes={chunk_sizes}")
    return dict(zip(names, numbers, strict=True))


def replace_device(module: nn.Module, replace: torch.device, by: torch.device) -> nn.Module:
    """Move all submodules of `module` whose parameters and buffers are on the device `replace` to the device `by`.

    Raises:
        ValueError: if a submodule's own parameters and buffers are on several devices.
    """
    for name, submodule in module.named_modules():
        tensors = [*submodule.named_parameters(recurse=False), *submodule.named_buffers(recurse=False)]
        found = {tensor.device for _, tensor in tensors}
        if len(found) > 1:
            raise ValueError(
                f"Found multiple devices for {name or type(module).__name__!r}: {', '.join(map(str, found))}"
            )
        if found == {torch.device(replace)}:
            submodule._apply(lambda tensor: tensor.to(by), recurse=False)  # `to` would move the children too
    return module


def main(
    checkpoint_dir: Path | None = None,
    prompt: str = "What food do llamas eat?",
    *,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    quantize: Quantization | None = None,
    precision: str | None = None,
    compile: bool = False,
    kv_cache: Literal["dense", "lastrec"] = "dense",
    cache_length: int | None = None,
    sinks: int = 0,
    prompt_chunksize: int | None = None,
    seed: int = 1234,
    devices: int | None = None,
) -> None:
    """Answer a prompt with a model whose layers are spread over several GPUs.

    The weights are read straight to where they work, so the model need not fit into one GPU. GPUs take turns: for speed,
    see generate_tp.

    Args:
        checkpoint_dir: Folder of a checkpoint (Hugging Face or LitGPT), a .gguf file, or a model's name. Default: a small
            model that is fetched once.
        prompt: What to answer.
        sys_prompt: System prompt, where the model's chat template has one.
        num_samples: Number of answers, generated together as one batch.
        max_new_tokens: Most tokens of an answer.
        top_k: Draw each token from the k likeliest ones only.
        top_p: Draw each token from the likeliest ones whose probabilities add up to this.
        temperature: Below 1 the likelier tokens gain, above 1 they lose; 0 always takes the likeliest.
        quantize: Keep the weights in fewer bits: int8 or int4 (with one device also bnb.*).
        precision: bf16-true, 16-true or 32-true. Default: what the device computes well in.
        compile: Compile the decoding step; on one device only.
        kv_cache: What the key-value cache keeps: dense (every token) or lastrec (the last cache_length ones).
        cache_length: Tokens that the key-value cache holds. Default: as many as are needed (dense), 1024 (lastrec).
        sinks: First tokens that a lastrec cache never drops.
        prompt_chunksize: Most tokens of the prompt that go through the model at once. Default: all of them.
        seed: Of the random numbers.
        devices: Number of GPUs. Default: all there are; without any, the CPU.
    """
    check_options(prompt, num_samples, max_new_tokens, cache_length)
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    chosen = choose_devices(devices)
    if compile and len(chosen) > 1:
        raise ValueError(f"compile is for one device, not {len(chosen)}: leave it out, or use --devices 1")

    def load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantize: str | None = None) -> GPT:
        if len(chosen) == 1:
            return load_model(checkpoint, dtype, device, quantize)
        return load_spread(checkpoint, dtype, chosen, quantize)

    started = time.perf_counter()
    ready = make_ready(checkpoint_dir, precision, quantize, compile, device=chosen[0], load=load)
    choose_kv_caches(ready.model, kv_cache, cache_length, num_samples, sinks)
    tokens = encode_prompt(ready.tokenizer, ready.prompt_style, prompt, sys_prompt=sys_prompt).to(ready.device)
    seconds = time.perf_counter() - started
    names = ", ".join(str(device) for device in chosen)
    print(f"Model loaded in {seconds:.1f} s, its layers on {names}", file=sys.stderr)
    print_answers(ready, tokens, max_new_tokens, sampling, num_samples, prompt_chunksize)
