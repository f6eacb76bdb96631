"""A check that modules are unchanged, fast enough for every decode step.

The only place that reads the dictionaries of `nn.Module`: attributes take several times as long, and hooks have no public
accessor.
"""

from collections.abc import Iterable

import torch
from torch import nn


class ModuleWatch:
    """Remembers one tensor of each module (they move together) or one child. Modules in `apart` are ignored."""

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
            first = next(((*place, place[2].data_ptr()) for place in tensors if place[2] is not None), None)
            if first is not None:
                self.tensors.append(first)
            else:
                children = ((module._modules, name, child) for name, child in module.named_children())
                self.children += [place for place in children if id(place[2]) not in apart][:1]

    def has_hooks(self) -> bool:
        """Whether a module has forward hooks now."""
        return any(self.hooks)

    def is_unchanged(self) -> bool:
        """Whether all tensors and children are the same objects, at the same addresses."""
        return all(own.get(name) is child for own, name, child in self.children) and all(
            own.get(name) is x and x.data_ptr() == at for own, name, x, at in self.tensors
        )
