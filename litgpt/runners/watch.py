"""Whether modules are still as they were, asked in every step of decoding.

The one place that reads `nn.Module`'s own dictionaries: by attributes the same takes several times as long, and of hooks there
is no other word.
"""

from collections.abc import Iterable

import torch
from torch import nn


class ModuleWatch:
    """Notes what modules hold: of each one tensor, for they move together, or one child. Those in `apart` do not count."""

    def __init__(self, modules: Iterable[nn.Module], apart: Iterable[nn.Module] = ()) -> None:
        apart = {id(part) for module in apart for part in module.modules()}
        self.tensors: list[tuple[dict, str, torch.Tensor, int]] = []
        self.children: list[tuple[dict, str, nn.Module]] = []
        self.hooks: list[dict] = []
        for module in modules:
            if id(module) in apart:
                continue
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
            tensors = ((own, name, x) for own in (module._parameters, module._buffers) for name, x in own.items())
            held = next(((*place, place[2].data_ptr()) for place in tensors if place[2] is not None), None)
            if held is not None:
                self.tensors.append(held)
            else:
                children = ((module._modules, name, child) for name, child in module.named_children())
                self.children += [place for place in children if id(place[2]) not in apart][:1]

    def has_hooks(self) -> bool:
        """Whether a module has forward hooks by now."""
        return any(self.hooks)

    def is_unchanged(self) -> bool:
        """Whether all tensors and children are the same, where they were."""
        return all(own.get(name) is child for own, name, child in self.children) and all(
            own.get(name) is x and x.data_ptr() == at for own, name, x, at in self.tensors
        )
