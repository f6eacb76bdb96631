"""Layers whose weights are packed for a kernel, or quantised."""

import itertools
import weakref
from abc import ABC, abstractmethod

import torch
from torch import nn

from litgpt.kernels.structs import Weight


class OpaqueLayer(nn.Module, ABC):
    """A layer for inference whose weights are not plain parameters. This class is the interface to them.

    Attributes:
        in_features, out_features: sizes of the last dimension of input and output.
    """

    in_features: int
    out_features: int

    def __init__(self) -> None:
        super().__init__()
        self._register()

    def _register(self) -> None:
        self.key = next(_next_key)
        _layers[self.key] = self

    def __setstate__(self, state: dict) -> None:  # of a copy
        super().__setstate__(state)
        self._register()

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The output (..., out_features) for x (..., in_features), in plain code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return torch.ops.litgpt.opaque_layer(x, self.key, self.out_features)
        return self.product(x)

    @abstractmethod
    def weight_samples(self) -> dict[str, torch.Tensor]:
        """A few values of every weight, by the names of plain layers, for `litgpt.fingerprint`."""

    def kernel_weight(self) -> Weight | None:
        """The weight as `litgpt.kernels` reads it, without a copy; None if they cannot read it."""
        return None

    def pack(self) -> None:
        """Bring the weight into the order of the kernel that is used for it."""

    def unpacked(self) -> nn.Module:
        """The layer that takes this one's place when packing is undone."""
        return self


# Compiled graphs cannot hold opaque tensors: there a layer is an integer key, looked up when the graph runs.
_layers: "weakref.WeakValueDictionary[int, OpaqueLayer]" = weakref.WeakValueDictionary()
_next_key = itertools.count()

_library = torch.library.Library("litgpt", "FRAGMENT")
_library.define("opaque_layer(Tensor x, int key, int out_features) -> Tensor")
_library.impl("opaque_layer", lambda x, key, out_features: _layers[key].product(x), "CPU")
torch.library.register_fake(
    "litgpt::opaque_layer", lambda x, key, out_features: x.new_empty(*x.shape[:-1], out_features), lib=_library
)
