"""Layers whose weights are packed for a kernel, or quantised."""

import itertools
import weakref
from abc import ABC, abstractmethod

import torch
from torch import nn

from litgpt.kernels.structs import Weight


class OpaqueLayer(nn.Module, ABC):
    """Interface of layers for inference whose weights are not plain parameters.

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
        """The output (..., out_features) for x (..., in_features), outside compiled graphs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return torch.ops.litgpt.opaque_layer(x, self.key, self.out_features)
        return self.product(x)

    @abstractmethod
    def weight_samples(self) -> dict[str, torch.Tensor]:
        """A few values of every weight, by the names of plain layers, for `litgpt.fingerprint`."""

    def kernel_weight(self) -> Weight | None:
        """The weight for `litgpt.kernels`, without a copy; None if they do not support it."""
        return None

    def packed_ranges(self) -> list[tuple[int, int]]:
        """Addresses of weights that are no parameters or buffers: of each the first, and the one after the last."""
        return []

    def pack(self) -> None:
        """Reorder the weight for its kernel."""

    def unpacked(self) -> nn.Module:
        """The layer that replaces this one when packing is undone."""
        return self


class LowRankLayer(nn.Module):
    """Interface of layers that add a product with two small matrices to the output of another, `linear`."""

    linear: nn.Module

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (r, in_features), and B (r, out_features) in float32, with which (x A') B is added, as they are now; they stay in
        memory as long as the layer. None: something else is added."""
        return None


# In compiled graphs, which cannot hold opaque tensors, a layer is an integer key that is looked up at run time
_layers: "weakref.WeakValueDictionary[int, OpaqueLayer]" = weakref.WeakValueDictionary()
_next_key = itertools.count()

_library = torch.library.Library("litgpt", "FRAGMENT")
_library.define("opaque_layer(Tensor x, int key, int out_features) -> Tensor")
_library.impl("opaque_layer", lambda x, key, out_features: _layers[key].product(x), "CPU")
torch.library.register_fake(
    "litgpt::opaque_layer", lambda x, key, out_features: x.new_empty(*x.shape[:-1], out_features), lib=_library
)
