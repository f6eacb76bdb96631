"""A check that modules are unchanged, fast enough for every decode step.

The only place that reads the dictionaries of `nn.Module`: attributes take several times as long, and hooks have no public
accessor.
"""

from collections.abc import Iterable
from operator import is_

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ModuleWatch:
    """Remembers one tensor of each module (they move together) or one child, and the children of that name at `places`. Modules in
    `apart` are ignored."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        apart: Iterable[nn.Module] = (),
        places: Iterable[tuple[nn.Module, str]] = (),
    ) -> None:
        apart = {id(part) for module in apart for part in module.modules()}
        self.hooks: list[dict] = []
        self.handles = (-1, -1)  # of hooks that there were in the process when no module had one, the last two times
        found: list[tuple[dict, str]] = [(owner._modules, name) for owner, name in places]
        for module in modules:
            if id(module) in apart:
                continue
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
            tensors = [(own, name) for own in (module._parameters, module._buffers) for name in own]
            children = [(module._modules, name) for name, child in module.named_children() if id(child) not in apart]
            found += [(own, name) for own, name in tensors + children if own[name] is not None][:1]
        self.owners, self.names = [own for own, _ in found], [name for _, name in found]
        self.watched = [own[name] for own, name in found]
        self.tensors = [x for x in self.watched if isinstance(x, torch.Tensor)]
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))

    def has_hooks(self) -> bool:
        """Whether a module has forward hooks now.

        Modules are looked at if there were new hooks anywhere, and once more: another thread takes a number first, and then adds
        its hook.
        """
        handle = RemovableHandle.next_id
        if self.handles == (handle, handle):
            return False
        if any(self.hooks):
            return True
        self.handles = self.handles[1], handle
        return False

    def is_unchanged(self) -> bool:
        """Whether all tensors and children are the same objects, at the same addresses."""
        return (
            all(map(is_, map(dict.get, self.owners, self.names), self.watched))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )
