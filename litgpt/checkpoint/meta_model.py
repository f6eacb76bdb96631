"""Models on the meta device, for the names and shapes of their parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from litgpt.config import Config
from litgpt.model import GPT


def meta_model(config: Config, kind: Callable[[Config], GPT] = GPT) -> GPT:
    """A model of class `kind` that has shapes and no memory."""
    with torch.device("meta"), _WithoutRandomNumbers():
        return kind(config)


class _WithoutRandomNumbers(TorchFunctionMode):
    """Skips the initialisation of weights: random draws for meta tensors import torch's compiler, for most of 1 s."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
