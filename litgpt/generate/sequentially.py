"""`litgpt generate_sequentially`: the layers of a model on several devices (`litgpt.parallel.pipeline`)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.engine.loading import Ready, make_ready
from litgpt.generate.base import GenerateOptions, answer, check_request, prompt_lines
from litgpt.generate.options import command, option
from litgpt.model import GPT
from litgpt.parallel.pipeline import choose_devices, load_spread, spread_layers
from litgpt.parallel.tensor import chunk_sizes

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
    names = [name for name, part in module.named_modules() if isinstance(part, chunk_on)]
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
            places = {f"{name}.{key}".lstrip("."): tensor.device for key, tensor in tensors}
            raise ValueError(f"Found multiple devices: {places}")
        if found == {torch.device(replace)}:
            submodule._apply(lambda tensor: tensor.to(by), recurse=False)  # `to` would move the children too
    return module


@dataclass(frozen=True, kw_only=True)
class SequentialOptions(GenerateOptions):
    """The options of `litgpt generate_sequentially`."""

    devices: int | None = option(None, "Number of GPUs. Default: all there are; without any, the CPU.")


@command(SequentialOptions, "checkpoint_dir", "prompt")
def main(options: SequentialOptions) -> None:
    """Answer a prompt with a model whose layers are spread over several GPUs.

    Every weight is read directly to its device, so the model need not fit into one GPU. Only one GPU works at a time; generate_tp
    uses all at once.
    """
    lines = prompt_lines(options)
    devices = choose_devices(options.devices)
    if options.compile and len(devices) > 1:
        raise ValueError(f"compile is for one device, not {len(devices)}: leave it out, or use --devices 1")

    def place(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantize: str | None = None) -> GPT:
        if len(devices) == 1:
            return load_model(checkpoint, dtype, device, quantize)
        return load_spread(checkpoint, dtype, devices, quantize)

    def load() -> Ready:
        check = partial(check_request, options, lines)
        return make_ready(options.checkpoint_dir, **options.loading(), device=devices[0], load=place, check=check)

    names = ", ".join(str(device) for device in devices)
    answer(options, lines, load, note=f", its layers on {names}")
