"""Models without memory, to learn names and shapes of parameters from."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from litgpt.config import Config
from litgpt.model import GPT


def meta_model(config: Config, kind: Callable[[Config], GPT] = GPT) -> GPT:
    """A model that has shapes and no memory, as `kind` makes it."""
    with torch.device("meta"), _WithoutRandomNumbers():
        return kind(config)


class _WithoutRandomNumbers(TorchFunctionMode):
    """Skips the initialisation of weights: drawing for a meta tensor would import torch's compiler, for most of 1 s."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
