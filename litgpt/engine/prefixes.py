"""States of rows that finished, for later prompts that begin with the same tokens."""

from collections import abc
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(eq=False)
class KeptPrefix:
    """The first tokens of a sequence, with the state of its row in all caches.

    Attributes:
        tokens: (n,) int64, all that the caches have seen.
        least: least number of tokens, next to 0, that the state can be rewound to.
        long_rope: whether they were rotated by LongRoPE's long factors.
        states: one a layer, as `LayerCaches.state_of_row` gives them.
        n_bytes: bytes of the state.
    """

    tokens: np.ndarray
    least: int
    long_rope: bool
    states: list[dict[str, Any]]
    n_bytes: int

    @classmethod
    def of(
        cls, tokens: abc.Sequence[int], least: int, long_rope: bool, states: abc.Iterable[dict[str, Any]]
    ) -> "KeptPrefix":
        """A prefix with its state in main memory."""
        found = [{name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in state.items()} for state in states]
        new = cls(np.asarray(tokens, dtype=np.int64), least, long_rope, found, 0)
        sizes = (x.nbytes for state in found for x in state.values() if isinstance(x, torch.Tensor))
        new.n_bytes = new.tokens.nbytes + sum(sizes)
        return new

    def common(self, tokens: np.ndarray) -> int:
        """Number of first tokens that are the same."""
        n = min(len(self.tokens), len(tokens))
        different = self.tokens[:n] != tokens[:n]
        return int(different.argmax()) if different.any() else n

    def covers(self, other: "KeptPrefix") -> bool:
        """Whether all that the other one can serve can be served from here."""
        return (
            self.long_rope == other.long_rope
            and self.least <= other.least
            and self.common(other.tokens) == len(other.tokens)
        )


class PrefixStore:
    """Kept prefixes, in main memory, of at most so many bytes; those that were not used for the longest time go first.

    Args:
        max_bytes: of all states together (0: nothing is kept).
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"the memory for kept prefixes must be at least 0 bytes, got {max_bytes}")
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.n_lookups = self.n_hits = self.n_reused_tokens = 0
        self._kept: list[KeptPrefix] = []  # the one used last at the end
        self._named: dict[str, KeptPrefix] = {}  # that stay until they are taken out

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, tokens: abc.Sequence[int], long_rope: bool = False) -> tuple[KeptPrefix, int] | None:
        """The kept prefix that has most of the first tokens of a prompt, and how many of them; the prompt's last token is
        never among them, since it has to be run."""
        self.n_lookups += 1
        wanted, best = np.asarray(tokens[:-1], dtype=np.int64), None
        for kept in [*self._kept, *self._named.values()]:
            n = kept.common(wanted)
            if n > (best[1] if best else 0) and n >= kept.least and kept.long_rope == long_rope:
                best = kept, n
        if best:
            if best[0] in self._kept:
                self._kept.remove(best[0])
                self._kept.append(best[0])
            self.n_hits += 1
            self.n_reused_tokens += best[1]
        return best

    def put(
        self, tokens: abc.Sequence[int], least: int, long_rope: bool, states: abc.Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Keep a prefix, unless one that is kept has all of it; those that the new one covers are dropped.

        Args:
            tokens, least, long_rope: as in `KeptPrefix`.
            states: gives the state.
        """
        new = KeptPrefix.of(tokens, least, long_rope, ())
        if not self.max_bytes or not len(new.tokens) or any(kept.covers(new) for kept in self._named.values()):
            return
        for kept in self._kept:
            if kept.covers(new):
                self._kept.remove(kept)
                self._kept.append(kept)
                return
        new = KeptPrefix.of(tokens, least, long_rope, states())
        if new.n_bytes > self.max_bytes:
            return
        for kept in [kept for kept in self._kept if new.covers(kept)]:
            self._drop(kept)
        while self.n_bytes + new.n_bytes > self.max_bytes:
            self._drop(self._kept[0])
        self._kept.append(new)
        self.n_bytes += new.n_bytes

    def name(self, name: str, kept: KeptPrefix | None) -> None:
        """Keep a prefix by a name beside the others, in place of an earlier one of that name (None: only drop that)."""
        self._named.pop(name, None)
        if kept is not None:
            self._named[name] = kept

    def named(self) -> list[tuple[str, KeptPrefix]]:
        """Those with a name."""
        return sorted(self._named.copy().items())

    def _drop(self, kept: KeptPrefix) -> None:
        self._kept.remove(kept)
        self.n_bytes -= kept.n_bytes

    def clear(self) -> None:
        """Forget all that have no name."""
        self._kept, self.n_bytes = [], 0
