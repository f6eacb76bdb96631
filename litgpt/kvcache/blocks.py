"""Dense caches whose storage encodes tokens many at a time: when it does, the host knows."""

from collections.abc import Sequence
from typing import Any

import torch

from litgpt.attention import Consecutive, DefaultKeysAndValues, KeysAndValues
from litgpt.kvcache.baselines import DenseKVCache
from litgpt.kvcache.plan import Plan, Step, plan_by_length
from litgpt.kvcache.storages.kivi import KiviStorage


class BlockKVCache(DenseKVCache):
    """A dense cache with a `KiviStorage`. What a query sees in fewer bits depends on its position alone, so calls are cut where more
    tokens come to be encoded.

    A row can go back to the position after its last such cut.
    """

    storage: KiviStorage

    def get_keys_values(self) -> KeysAndValues | None:
        lengths = self.row_lengths
        if len(set(lengths)) < 2:
            return super().get_keys_values()
        shape = len(lengths), self.n_query_groups, max(lengths), self.head_size
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for row, length in enumerate(lengths):
            if length:
                own = self.storage.get(1, slice(0, length), torch.tensor([row], device=self.device))
                keys[row, :, :length], values[row, :, :length] = own.keys()[0], own.values()[0]
        return DefaultKeysAndValues(keys, values)

    def plan(
        self,
        input_pos: int,
        batch_size: int,
        T: int | Sequence[int],
        rows: Sequence[int] | None = None,
        static: bool = False,
    ) -> Plan:
        if static:
            raise ValueError("the storage kivi does not run in compiled code: leave out --compile, or use int8 or int4")
        lengths = self._check_call(input_pos, batch_size, T, rows)
        return plan_by_length(lengths, rows, T, self.device, lambda start, size: (self._steps(start, size), None))

    def _steps(self, start: int, T: int) -> list[Step]:
        """Steps for rows that hold `start` tokens, each of queries that see the same tokens in fewer bits."""
        steps, done = [], 0
        while done < T:
            size = min(T - done, self._next_cut(start + done) - start - done)
            stop = start + done + size
            whole = slice(done, done + size)
            slots = torch.arange(stop - size, stop, device=self.device)
            consecutive = Consecutive(size, stop, self.window, self.dtype, self.device)
            steps.append(Step(whole, slice(0, stop), None, None, consecutive, whole, slots, True))
            done += size
        return steps

    def _next_cut(self, position: int) -> int:
        """The next position whose query sees more tokens in fewer bits than the query at `position`."""
        return self.storage.sealed(position) + 2 * self.storage.window

    def plan_key(self) -> tuple:
        return *super().plan_key(), "blocks", self.storage.window

    def _write(self, step: Step, rows: torch.Tensor | None, key: torch.Tensor, *args: Any) -> None:
        start = step.read.stop - step.consecutive.T
        n = self.storage.sealed(start)
        if n > self.storage.sealed(start - 1):
            self.storage.seal(n - self.storage.window, rows, len(key))
        super()._write(step, rows, key, *args)

    def _keys_values(self, step: Step, rows: torch.Tensor | None, key: torch.Tensor, *args: Any) -> KeysAndValues:
        n = self.storage.sealed(step.read.stop - step.consecutive.T)
        return self.storage.tokens(n, step.read.stop, len(key), rows)

    # -- going back

    def rewind_limit(self, row: int) -> int:
        encoded = self.storage.sealed(self.row_lengths[row] - 1)
        return encoded + self.storage.window + 1 if encoded else 0

    @property
    def max_rewindable_tokens(self) -> int:
        rooms = (self._next_cut(length) - length - 1 for length in self.row_lengths or (0,))
        return max(0, min(super().max_rewindable_tokens, *rooms))
