"""Changes of caches are noted in one place, so that a step need not look for them in every layer."""

from typing import Any

import torch
from torch import nn


class Change:
    """One change; a class of its own, since compiled code cannot make an `object`."""


rows = Change()
"""Another object after each change of the numbers of a cache's rows, but for calls of all layers, and of its memory."""

memory = Change()
"""Another object after each change that may leave a cache with other parts or other buffers."""


class NotesChanges(nn.Module):
    """A module that notes when its attributes are set and its buffers moved. `_rows` are numbers, all else is memory.

    A buffer's own memory must stay: `setattr(storage, name, other)` is noted, `buffer.data = other` or `buffer.resize_` is not.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        global rows
        if name == "_rows":
            self.__dict__[name] = value  # `nn.Module` would look for parameters, which takes longer
            rows = Change()
        else:
            super().__setattr__(name, value)
            note()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        note()

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        note()

    def _apply(self, *args: Any, **kwargs: Any) -> "NotesChanges":
        """What `to` and the like call."""
        try:
            return super()._apply(*args, **kwargs)
        finally:
            note()


def note() -> None:
    """Note that a cache may have other parts or other buffers."""
    global rows, memory
    rows, memory = Change(), Change()
