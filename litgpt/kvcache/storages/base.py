"""How the keys and values of a cache are kept."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from litgpt.kernels import ops
from litgpt.kernels.structs import Vectors
from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues
from litgpt.kvcache.changes import NotesChanges
from litgpt.kvcache.params import KVCacheParams
from litgpt.pages import zeros

Index = slice | torch.Tensor


class Storage(NotesChanges, ABC):
    """Slots for keys and values: B rows x G heads x C slots. Knows nothing of positions or policies.

    What it holds is in buffers. Made of `KVCacheParams`, and of keyword arguments of its own.
    """

    blocks: ClassVar[bool] = (
        False  # whether tokens are encoded many at a time, in dense caches only: see `litgpt.kvcache.blocks`
    )
    has_kernel_codes: ClassVar[bool] = False  # whether `kernel_codes` may say how it encodes
    on_host: ClassVar[bool] = False  # whether buffers are in the host's memory, wherever the model is
    # where a storage encodes: keys and values as decoded, with the graph that they come from, for gradients to go through
    _through: tuple[torch.Tensor, torch.Tensor] | None = None

    @abstractmethod
    def set(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Write key and value (B, G, T, D) into `slots`: (T,) for all rows and heads, or (B, T) by row.

        `rows` (B,) names the rows written to (None: the first B).
        """

    @abstractmethod
    def get(self, batch: int, slots: Index, rows: torch.Tensor | None = None) -> KeysAndValues:
        """Keys and values in `slots` (a slice, or (N,) in any order) of `rows` (None: the first `batch`)."""

    def as_stored(self, key: torch.Tensor, value: torch.Tensor) -> KeysAndValues:
        """Keys and values (B, G, T, D) as `get` would give them, were they stored."""
        return DefaultKeysAndValues(key, value)

    def kernel_view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Buffers of keys and values (batch_size, G, C, ...) as `litgpt.kernels` reads and writes them; None: it cannot."""
        return None

    def kernel_codes(self) -> tuple[Vectors, Vectors] | None:
        """How the buffers of `kernel_view` are encoded (None: they are keys and values)."""
        return None

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was."""

    def slot_buffers(self) -> list[torch.Tensor]:
        """The buffers that have something for every slot, (batch_size, G, C, ...): all of them, unless a storage says which."""
        return list(self.buffers())

    def compact(self, index: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Slot j of row b and head g becomes what its slot `index[b, g, j]` was, for the (B, G, n) of `index`; slots from n on
        are free. What is stored moves as it is: nothing is decoded or encoded.

        Args:
            index: int64 slots.
            rows: (B,), the rows that are meant (None: the first B).
        """
        batch, G, n = index.shape
        row = torch.arange(batch, device=index.device) if rows is None else rows
        for buffer in self.slot_buffers():
            if ops.can_move_slots(buffer):
                ops.move_slots(buffer, index, rows)
                continue
            head = (row[:, None] * G + torch.arange(G, device=index.device))[..., None]
            source = (head * buffer.shape[2] + index).flatten()  # whole slots are copied, not element by element
            moved = buffer.flatten(0, 2).index_select(0, source).view(batch, G, n, *buffer.shape[3:])
            buffer[slice(batch) if rows is None else rows, :, :n] = moved

    @abstractmethod
    def state(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        """What the first `used` slots of the first `batch` rows hold, as it is stored: views of the buffers."""

    def load_state(self, state: Mapping[str, torch.Tensor], batch: int, used: int) -> None:
        """Take over what `state` gave.

        Raises:
            ValueError: if it is of another shape or dtype; nothing is changed then.
        """
        targets = self.state(batch, used)
        check_state(state, targets)
        for name, target in targets.items():
            target.copy_(state[name])
        self._through = None

    def empty_copy(self) -> "Storage":
        """A storage of the same kind and size that holds nothing."""
        bare = copy.copy(self)
        bare._through = None
        with torch.inference_mode(False):  # the buffers outlive the call that makes them
            return copy.deepcopy(bare, {id(x): zeros(x.shape, x.dtype, x.device) for x in self.buffers()})

    def detach_writes(self) -> None:
        """Give the buffers memory of their own, apart from what autograd has saved of them: written to before it was needed
        in a backward pass, that would be lost."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.clone())

    def detach_graph(self) -> None:
        """Forget how what is stored was computed."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            if buffer.requires_grad:
                setattr(self, name, buffer.detach())

    @classmethod
    def arguments(cls) -> dict[str, inspect.Parameter]:
        """The storage's own arguments by name."""
        _, _, *own = inspect.signature(cls.__init__).parameters.values()
        return {parameter.name: parameter for parameter in own}

    @abstractmethod
    def size_in_bits(self) -> dict[str, int]:
        """Bits allocated, by part."""

    @classmethod
    @abstractmethod
    def size_in_bits_apriori(cls, params: KVCacheParams, **arguments: object) -> dict[str, int]:
        """What `size_in_bits` of a storage with these parameters and arguments will be."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the keys and values that `set` takes and `get` gives."""


def bits_by_side(bits: Mapping[str, int]) -> dict[str, int]:
    """Of bits by names of buffers: those of keys, and those of values."""
    return {f"{side}s": sum(n for name, n in bits.items() if side in name) for side in ("key", "value")}


def check_state(state: Mapping[str, Any], targets: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless `state` has a tensor of the shape and dtype of every one in `targets`."""
    for name, target in targets.items():
        found = state.get(name)
        if found is None or found.shape != target.shape or found.dtype != target.dtype:
            what = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise ValueError(f"{name} of the state are {what}, the cache needs {tuple(target.shape)} {target.dtype}")


def write_slots(buffer: torch.Tensor, new: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Write `new` (B, heads, T, ...) into a buffer (batch_size, heads, slots, ...), with `slots` and `rows` as for `Storage.set`."""
    batch = new.shape[0]
    if rows is None and slots.ndim == 1:
        target = buffer if batch == buffer.shape[0] else buffer[:batch]
        target.index_copy_(2, slots, new)
    else:
        row = torch.arange(batch, device=new.device) if rows is None else rows
        buffer[row[:, None], :, slots.expand(batch, -1)] = new.transpose(1, 2)


def move_rows(buffers: Iterable[torch.Tensor], rows: Sequence[int]) -> None:
    """Row i of buffers (batch_size, ...) becomes what row `rows[i]` was."""
    moved = [(new, old) for new, old in enumerate(rows) if new != old]
    if moved:
        new, old = torch.tensor(moved).unbind(1)
        for buffer in buffers:
            buffer[new.to(buffer.device)] = buffer[old.to(buffer.device)]


def take(x: torch.Tensor, row: Index, slots: Index) -> torch.Tensor:
    """Some slots of some rows of a buffer (batch_size, heads, slots, ...)."""
    if isinstance(slots, slice):  # first, since taking rows copies
        return x[:, :, slots][row]
    return x[row][:, :, slots]


STORAGES: dict[str, type[Storage]] = {}
"""Storages by name."""

StorageClass = TypeVar("StorageClass", bound=type[Storage])


def register_storage(name: str) -> Callable[[StorageClass], StorageClass]:
    """Class decorator: the storage can be named from now on, in commands, `CacheSpec` and everything that takes one."""

    def register(storage: StorageClass) -> StorageClass:
        STORAGES[name] = storage
        return storage

    return register
