"""`litgpt generate_tp`: every layer divided among several processes, each with a device of its own."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.engine.loading import Quantization, choose_kv_caches, make_ready, parse_precision
from litgpt.engine.sampling import Sampling
from litgpt.generate.base import check_options, print_answers
from litgpt.model import GPT
from litgpt.parallel.processes import (
    join_group,
    launched_outside,
    number_of_processes,
    only_first_speaks,
    own_device,
    run_in_processes,
)
from litgpt.parallel.tensor import Shard, load_shard, shard_model
from litgpt.prompts import encode_prompt
from litgpt.runners.quantized_weights import MODES


def tensor_parallel(fabric: Any, model: GPT) -> GPT:
    """The part of a model that the process of a Lightning `fabric`, which has been launched, holds: a model of its own."""
    device = model.transformer.wte.weight.device
    return shard_model(model, model.dtype, device, fabric.global_rank, fabric.world_size)


def tensor_parallel_linear(fabric: Any, linear: nn.Linear, style: str) -> None:
    """Keep of a layer the rows ("colwise": of its outputs) or the columns ("rowwise": of its inputs) of this process.

    Raises:
        ValueError: if the processes cannot have equally many.
    """
    dim, name = {"colwise": (0, "out_features"), "rowwise": (1, "in_features")}[style]
    size, rest = divmod(getattr(linear, name), fabric.world_size)
    if rest:
        raise ValueError(
            f"{name} = {getattr(linear, name)} is not evenly divisible by the world size ({fabric.world_size})"
        )
    linear.weight.data = linear.weight.data.narrow(dim, fabric.global_rank * size, size)
    if linear.bias is not None and dim == 0:
        linear.bias.data = linear.bias.data.narrow(0, fabric.global_rank * size, size)
    setattr(linear, name, size)


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
    """Answer a prompt with a model whose layers are divided among several GPUs (tensor parallelism).

    Every process reads its part of the weights only, so the model need not fit into one GPU. The command starts the
    processes itself; under torchrun it is one of those that are there.

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
        quantize: Quantisation of the weights: int8 or int4.
        precision: bf16-true, 16-true or 32-true. Default: what the device computes well in.
        compile: Compile the decoding step. Takes a while at first, and is faster then.
        kv_cache: What the key-value cache keeps: dense (every token) or lastrec (the last cache_length ones).
        cache_length: Tokens that the key-value cache holds. Default: as many as are needed (dense), 1024 (lastrec).
        sinks: First tokens that a lastrec cache never drops.
        prompt_chunksize: Most tokens of the prompt that go through the model at once. Default: all of them.
        seed: Of the random numbers.
        devices: Number of processes. Default: one for every GPU, or 2 where there are none.
    """
    check_options(prompt, num_samples, max_new_tokens, cache_length)
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    if quantize is not None and quantize not in MODES:
        raise ValueError(f"quantize={quantize!r} is not available with divided layers: use {' or '.join(MODES)}")
    world_size = number_of_processes(devices)
    # what can be refused is refused before there are processes; and a model is fetched once
    path = find_checkpoint(checkpoint_dir)
    Shard(open_checkpoint(path).config, 0, world_size)
    parse_precision(precision, torch.device("cpu"))
    options = {
        "path": path,
        "prompt": prompt,
        "sys_prompt": sys_prompt,
        "num_samples": num_samples,
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "weights": (precision, quantize, compile),
        "caches": (kv_cache, cache_length, num_samples, sinks),
        "prompt_chunksize": prompt_chunksize,
    }
    if (outside := launched_outside()) is not None:
        join_group()
        answer(outside[0], world_size, options)
    else:
        run_in_processes(answer, world_size, world_size, options)


def answer(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """What each process does: all compute the same answer, and the first one prints it."""
    with only_first_speaks(rank):
        started = time.perf_counter()
        load = partial(load_shard, rank=rank, world_size=world_size)
        ready = make_ready(options["path"], *options["weights"], device=own_device(rank), load=load)
        choose_kv_caches(ready.model, *options["caches"])
        tokens = encode_prompt(
            ready.tokenizer, ready.prompt_style, options["prompt"], sys_prompt=options["sys_prompt"]
        ).to(ready.device)
        seconds = time.perf_counter() - started
        print(
            f"Model loaded in {seconds:.1f} s by {world_size} processes; figures are the first one's", file=sys.stderr
        )
        print_answers(
            ready,
            tokens,
            options["max_new_tokens"],
            options["sampling"],
            options["num_samples"],
            options["prompt_chunksize"],
        )
