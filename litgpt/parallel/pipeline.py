"""Layers on several devices, with their caches; activations move from device to device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.engine.loading import default_device
from litgpt.model import GPT
from litgpt.parallel.tensor import chunk_sizes
from litgpt.rope import Rope


def devices_of_layers(n_layer: int, devices: Sequence[torch.device | str]) -> list[torch.device]:
    """The device of each layer: consecutive layers share one, and the first device, which also has the embeddings, has the
    fewest.

    Raises:
        ValueError: if there are more devices than layers, or none.
    """
    if not 1 <= len(devices) <= n_layer:
        raise ValueError(f"{n_layer} layers cannot be spread over {len(devices)} devices: give 1 to {n_layer}")
    sizes = chunk_sizes(n_layer, len(devices))
    return [torch.device(device) for device, size in zip(devices, sizes, strict=True) for _ in range(size)]


def load_spread(
    checkpoint: Checkpoint, dtype: torch.dtype, devices: Sequence[torch.device | str], quantize: str | None = None
) -> GPT:
    """A model with a checkpoint's weights, each read directly to its device."""
    places = devices_of_layers(checkpoint.config.n_layer, devices)

    def device_of(module: str) -> torch.device:
        parts = module.split(".")
        return places[int(parts[2])] if parts[:2] == ["transformer", "h"] and len(parts) > 2 else places[0]

    model = load_model(checkpoint, dtype, device_of, quantize)
    _pass_between(model, places)
    return model


def spread_layers(model: GPT, devices: Sequence[torch.device | str]) -> GPT:
    """Spread the layers of a model over devices, with embeddings and final norm on the first. Caches are dropped.

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
    """Move the inputs of blocks to their devices, `places`."""
    arrivals = {device: _Arrival(device) for device in places}
    for block, device in zip(model.transformer.h, places, strict=True):
        block.register_forward_pre_hook(arrivals[device])
    model.transformer.ln_f.register_forward_pre_hook(lambda module, inputs: inputs[0].to(places[0]))
    model.layer_devices = places


class _Arrival:
    """Moves the arguments of blocks to a device, and those shared by all blocks of a call once."""

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
