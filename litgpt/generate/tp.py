"""`litgpt generate_tp`: every layer divided among several processes, each with a device of its own."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.engine.loading import Ready, make_ready, parse_precision
from litgpt.generate.base import GenerateOptions, answer, check_request, prompt_lines
from litgpt.generate.options import command, option
from litgpt.generate.prompts_file import PromptLine
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
from litgpt.runners.quantized_weights import MODES


def tensor_parallel(fabric: Any, model: GPT) -> GPT:
    """The shard of a model for this process of a Lightning `fabric` that was launched."""
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


@dataclass(frozen=True, kw_only=True)
class TensorParallelOptions(GenerateOptions):
    """The options of `litgpt generate_tp`."""

    devices: int | None = option(None, "Number of processes. Default: one for every GPU, or 2 where there are none.")


@command(TensorParallelOptions, "checkpoint_dir", "prompt")
def main(options: TensorParallelOptions) -> None:
    """Answer a prompt with a model whose layers are divided among several GPUs (tensor parallelism).

    Every process reads only its part of the weights, so the model need not fit into one GPU. The command starts the processes,
    unless torchrun has started them.
    """
    # errors come before processes are started; a model is downloaded, and a pipe read, once
    lines = prompt_lines(options)
    if options.quantize is not None and options.quantize not in MODES:
        raise ValueError(
            f"quantize={options.quantize!r} is not available with divided layers: use {' or '.join(MODES)}"
        )
    world_size = number_of_processes(options.devices)
    path = find_checkpoint(options.checkpoint_dir, options.access_token)
    checkpoint = open_checkpoint(path)
    Shard(checkpoint.config, 0, world_size)
    parse_precision(options.precision, torch.device("cpu"))
    tokenizer = checkpoint.tokenizer()
    check_request(options, lines, checkpoint, tokenizer, checkpoint.prompt_style(tokenizer))
    options = replace(options, checkpoint_dir=path)
    if (outside := launched_outside()) is not None:
        join_group()
        answer_in_process(outside[0], world_size, options, lines)
    else:
        run_in_processes(answer_in_process, world_size, world_size, options, lines)


def answer_in_process(rank: int, world_size: int, options: TensorParallelOptions, lines: list[PromptLine]) -> None:
    """Run in each process: all compute the same answers, and the first one writes them."""

    def load() -> Ready:
        part = partial(load_shard, rank=rank, world_size=world_size)
        return make_ready(options.checkpoint_dir, **options.loading(), device=own_device(rank), load=part)

    if rank and options.out is not None:
        options = replace(options, out=Path(os.devnull))
    with only_first_speaks(rank):
        note = f" by {world_size} process{'es' * (world_size > 1)}; figures are the first one's"
        answer(options, lines, load, note=note)
