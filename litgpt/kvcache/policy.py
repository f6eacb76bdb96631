"""Which tokens of a sequence stay in a cache, as a function of their positions."""

from abc import ABC, abstractmethod

import torch


class Policy(ABC):
    """Says which slot a token takes. A token stays until a later one takes its slot.

    Positions are per row: 0 is the first token of that row. Positions below `cache_length` take the slot of the same
    number, so that a sequence which fits is stored in order. Policies are values: they hold parameters and no state.

    Args:
        cache_length: C, the number of slots.
        sinks: first tokens of the sequence that keep their slots for good.
    """

    evicts = True  # False: a full cache refuses more tokens

    def __init__(self, cache_length: int, sinks: int = 0) -> None:
        if not 0 <= sinks < cache_length:
            raise ValueError(f"sinks must be in 0..{cache_length - 1} (cache_length - 1), got {sinks}")
        self.cache_length = cache_length
        self.sinks = sinks

    def __repr__(self) -> str:
        """The policy's name and parameters: policies that read the same do the same."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @abstractmethod
    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Slot that the token at each of `positions` (int64, any shape) takes."""

    @property
    def reach(self) -> int:
        """How many of a sequence's last tokens the slots hold, next to the first `sinks`."""
        return self.cache_length - self.sinks

    def held(self, length: int) -> tuple[range, range]:
        """Positions held after `length` tokens of a sequence: the kept first ones, and the last ones."""
        first = min(self.sinks, length)
        return range(first), range(max(length - self.reach, first), length)

    def slot_positions(self, lengths: torch.Tensor) -> torch.Tensor:
        """Position in every slot after `lengths` (B,) tokens of a row's sequence, (B, C) int64, -1 in empty slots."""
        device, length = lengths.device, lengths.unsqueeze(-1)
        first = torch.arange(self.sinks, device=device).expand(len(lengths), -1)
        last = (length - self.reach).clamp(min=self.sinks) + torch.arange(self.reach, device=device)
        positions = torch.cat((first, last), dim=-1)
        known = torch.where(positions < length, positions, -1)
        return torch.empty_like(known).scatter_(1, self.slots(positions), known)

    def crop_limit(self, length: int, window: int | None) -> int:
        """Least n such that forgetting all but the first n of `length` tokens leaves all that later tokens may see, in a
        layer with a sliding `window` or without one (None)."""
        if length <= self.cache_length:
            return 0
        seen = self.reach if window is None else min(window, self.reach)
        return min(length, length - self.reach + seen - 1)
