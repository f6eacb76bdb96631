"""What a cache policy is: a value that says which tokens of a sequence stay."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from litgpt.config import Config

DEFAULT_LENGTH = 1024  # slots of a cache that evicts, where no length is given


@dataclass(frozen=True)
class Policy(ABC):
    """The parameters of a policy, and no state: policies with equal parameters are equal, also where these are tensors.

    A policy of one's own is a frozen dataclass that is derived from a kind of policy, such as `PositionalPolicy`; its
    fields are its arguments. `register_policy` gives it a name.

    Args:
        cache_length: C, the number of slots.
    """

    cache_length: int
    evicts: ClassVar[bool] = True  # False: a full cache refuses more tokens

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("__eq__", "__hash__", "__repr__"):  # `dataclass` does not replace what a class has itself
            if name not in vars(cls):
                setattr(cls, name, getattr(cls, name))

    def __post_init__(self) -> None:
        if self.cache_length < 1:
            raise ValueError(f"cache_length must be at least 1, got {self.cache_length}")

    @cached_property
    def key(self) -> tuple:
        """What the policy is compared by: its class and its parameters, tensors by their contents."""
        return type(self), *((field.name, _comparable(getattr(self, field.name))) for field in fields(self))

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Policy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.key[1:])})"

    @classmethod
    def arguments(cls) -> dict[str, Field]:
        """The policy's own arguments by name."""
        return {field.name: field for field in fields(cls) if field.init and field.name != "cache_length"}

    @classmethod
    def default_cache_length(cls, config: Config) -> int:
        """Slots where no number is given: the model's context, for policies that evict `DEFAULT_LENGTH` at most."""
        return min(config.block_size, DEFAULT_LENGTH) if cls.evicts else config.block_size


@dataclass(frozen=True)
class PositionalPolicy(Policy):
    """A policy that looks at positions only: it says which slot a token takes, and a token stays until a later one takes
    its slot.

    Positions are per row: 0 is the first token of that row. Positions below `cache_length` take the slot of the same
    number, so that a sequence which fits is stored in order. The first `n_sink` tokens of a sequence keep their slots for
    good; of the others the last `reach` ones are held, in slots that are all distinct.
    """

    n_sink: ClassVar[int] = 0  # a field or a property, in policies that keep the first tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n_sink, int) or not 0 <= self.n_sink < self.cache_length:
            last = self.cache_length - 1
            raise ValueError(f"n_sink must be in 0..{last} (cache_length - 1), got {self.n_sink!r}")

    @abstractmethod
    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Slot that the token at each of `positions` (int64, any shape) takes."""

    @property
    def reach(self) -> int:
        """How many of a sequence's last tokens the slots hold, next to the first `n_sink`."""
        return self.cache_length - self.n_sink

    def held(self, length: int) -> tuple[range, range]:
        """Positions held after `length` tokens of a sequence: the kept first ones, and the last ones."""
        first = min(self.n_sink, length)
        return range(first), range(max(length - self.reach, first), length)

    def slot_positions(self, lengths: torch.Tensor) -> torch.Tensor:
        """Position in every slot after `lengths` (B,) tokens of a row's sequence, (B, C) int64, -1 in empty slots."""
        device, length = lengths.device, lengths.unsqueeze(-1)
        first = torch.arange(self.n_sink, device=device).expand(len(lengths), -1)
        last = (length - self.reach).clamp(min=self.n_sink) + torch.arange(self.reach, device=device)
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


POLICIES: dict[str, type[Policy]] = {}
"""Policies by name."""

PolicyClass = TypeVar("PolicyClass", bound=type[Policy])


def register_policy(name: str) -> Callable[[PolicyClass], PolicyClass]:
    """Class decorator: the policy can be named from now on, in commands, `CacheSpec` and everything that takes one."""

    def register(policy: PolicyClass) -> PolicyClass:
        POLICIES[name] = policy
        return policy

    return register


def _comparable(value: Any) -> Any:
    """A stand-in for a parameter that is hashable, and equal to that of an equal parameter."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return "tensor", str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest()
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((name, _comparable(of_name)) for name, of_name in sorted(value.items()))
    return value
