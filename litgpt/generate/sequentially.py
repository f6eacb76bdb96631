"""`litgpt generate_sequentially`: layers spread over devices, each with its cache; what goes on from layer to layer moves."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.engine.loading import Quantization, choose_kv_caches, default_device, make_ready
from litgpt.engine.sampling import Sampling
from litgpt.generate.base import check_options, print_answers
from litgpt.model import GPT
from litgpt.parallel.tensor import chunk_sizes
from litgpt.prompts import encode_prompt
from litgpt.rope import Rope


def devices_of_layers(n_layer: int, devices: Sequence[torch.device | str]) -> list[torch.device]:
    """The device of each layer: consecutive ones share a device, and the first device, which has the embeddings too, has
    the fewest.

    Raises:
        ValueError: if there are more devices than layers, or none.
    """
    if not 1 <= len(devices) <= n_layer:
        raise ValueError(f"{n_layer} layers cannot be spread over {len(devices)} devices: give 1 to {n_layer}")
    sizes = chunk_sizes(n_layer, len(devices))
    return [torch.device(device) for device, size in zip(devices, sizes, strict=True) for _ in range(size)]


def load_sequential(
    checkpoint: Checkpoint, dtype: torch.dtype, devices: Sequence[torch.device | str], quantize: str | None = None
) -> GPT:
    """A model with a checkpoint's weights, each read to the device where it is to work."""
    places = devices_of_layers(checkpoint.config.n_layer, devices)

    def device_of(module: str) -> torch.device:
        parts = module.split(".")
        return places[int(parts[2])] if parts[:2] == ["transformer", "h"] and len(parts) > 2 else places[0]

    model = load_model(checkpoint, dtype, device_of, quantize)
    _pass_between(model, places)
    return model


def sequential(model: GPT, devices: Sequence[torch.device | str]) -> GPT:
    """Spread the layers of a model over devices. Embeddings and final norm are on the first one; caches are gone.

    Raises:
        ValueError: if there are more devices than layers, or none, or the model was spread before.
    """
    if model.layer_devices is not None:
        raise ValueError("the model's layers are spread over devices already")
    places = devices_of_layers(model.config.n_layer, devices)
    model.clear_kv_caches(assigned=True)
    for module in (model.lm_head, model.transformer.wte, model.transformer.ln_f):
        module.to(places[0])
    for block, device in zip(model.transformer.h, places, strict=True):
        block.to(device)
    _pass_between(model, places)
    return model


def _pass_between(model: GPT, places: list[torch.device]) -> None:
    """Have blocks, which are on `places`, take their inputs from wherever they come."""
    arrivals = {device: _Arrival(device) for device in places}
    for block, device in zip(model.transformer.h, places, strict=True):
        block.register_forward_pre_hook(arrivals[device])
    model.transformer.ln_f.register_forward_pre_hook(lambda module, inputs: inputs[0].to(places[0]))
    model.layer_devices = places


class _Arrival:
    """Brings the arguments of blocks to their device; what all blocks of a call share is brought there once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sent: tuple[Any, Any] = None, None
        self.arrived: tuple[list[Rope], torch.Tensor] | None = None

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, rope, plan, idx = inputs
        if self.sent[0] is not rope or self.sent[1] is not idx:
            self.sent = rope, idx
            self.arrived = [tuple(part.to(self.device) for part in pair) for pair in rope], idx.to(self.device)
        rope, idx = self.arrived
        return x.to(self.device), rope, plan, idx


def choose_devices(number: int | None, kind: str | None = None) -> list[torch.device]:
    """The first `number` GPUs (None: all), or the CPU where there are none, or `kind` is "cpu".

    Raises:
        ValueError: if there are not as many.
    """
    gpus = torch.cuda.device_count() if (kind or default_device().type) == "cuda" else 0
    available = [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    if number is not None and not 1 <= number <= len(available):
        found = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "the CPU only, which is one device"
        raise ValueError(f"devices={number}, but there is {found}")
    return available[:number]


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
        return load_sequential(checkpoint, dtype, chosen, quantize)

    started = time.perf_counter()
    ready = make_ready(checkpoint_dir, precision, quantize, compile, device=chosen[0], load=load)
    choose_kv_caches(ready.model, kv_cache, cache_length, num_samples, sinks)
    tokens = encode_prompt(ready.tokenizer, ready.prompt_style, prompt, sys_prompt=sys_prompt).to(ready.device)
    seconds = time.perf_counter() - started
    names = ", ".join(str(device) for device in chosen)
    print(f"Model loaded in {seconds:.1f} s, its layers on {names}", file=sys.stderr)
    print_answers(ready, tokens, max_new_tokens, sampling, num_samples, prompt_chunksize)
