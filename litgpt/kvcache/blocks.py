"""Dense caches whose storage encodes tokens many at a time: when it does, the host knows."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from litgpt.device_tensor import device_tensor
from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues
from litgpt.kvcache.baselines import DenseKVCache
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.plan import Part, Plan, Sealed, Sealing, Step
from litgpt.kvcache.positional_plan import plan_by_length
from litgpt.kvcache.storages.kivi import KiviStorage
from litgpt.masks import Consecutive, position_bias


class BlockKVCache(DenseKVCache):
    """A dense cache with a `KiviStorage`. What a query sees in fewer bits depends on its position alone, so calls are cut where more
    tokens come to be encoded.

    A row can go back to the position after its last such cut.
    """

    STORAGE = KiviStorage
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
        plan = plan_by_length(lengths, rows, T, self.device, lambda start, size: Part(self._steps(start, size)))
        found = (self._sealing(part, batch_size) for part in plan.parts)
        chosen = [lengths[row] for row in (range(batch_size) if rows is None else rows)]
        together = self._together(chosen, plan.parts, rows) if T == 1 and len(plan.parts) > 1 else None
        return replace(plan, boundaries=tuple(x for x in found if x is not None), together=together)

    def _steps(self, start: int, T: int) -> list[Step]:
        """Steps for rows that hold `start` tokens, each of queries that see the same tokens in fewer bits."""
        steps, done = [], 0
        while done < T:
            size = min(T - done, self._next_cut(start + done) - start - done)
            stop = start + done + size
            whole = slice(done, done + size)
            slots = torch.arange(stop - size, stop, device=self.device) % self.storage.ring
            consecutive = Consecutive(size, stop, self.window, self.dtype, self.device)
            kept = None
            if done + size == T:
                last = torch.arange(max(start, stop - self.storage.ring), stop, device=self.device)
                kept = last - (stop - size), last % self.storage.ring
            sealed = Sealed((self.storage.sealed(stop - size),), self.storage.ring, kept)
            steps.append(Step(whole, slice(0, stop), None, None, consecutive, whole, slots, True, sealed=sealed))
            done += size
        return steps

    def _sealing(self, part: Part, batch_size: int) -> Sealing | None:
        """What has to be encoded before a part of a plan, all of it stored by earlier calls."""
        start = part.steps[0].read.stop - part.steps[0].consecutive.T
        n = self.storage.sealed(start)
        if n == self.storage.sealed(start - 1):
            return None
        return Sealing(n - self.storage.window, part.rows, batch_size if part.rows is None else len(part.rows))

    def _together(self, lengths: list[int], parts: list[Part], rows: Sequence[int] | None) -> Part:
        """One step for a new token of each of several rows, which hold `lengths` tokens."""
        positions = device_tensor(lengths, self.device)
        stored = torch.arange(max(lengths) + 1, device=self.device)[None]
        bias = position_bias(positions[:, None], stored, self.dtype).unsqueeze(1)
        sealed = Sealed(tuple(map(self.storage.sealed, lengths)), self.storage.ring)
        slots, whole = (positions % self.storage.ring)[:, None], slice(0, 1)
        step = Step(whole, None, None, bias, None, whole, slots, True, sealed=sealed)
        return Part([step], None, None if rows is None else device_tensor(list(rows), self.device))

    def _next_cut(self, position: int) -> int:
        """The next position whose query sees more tokens in fewer bits than the query at `position`."""
        return self.storage.sealed(position) + 2 * self.storage.window

    def plan_key(self) -> tuple:
        return *super().plan_key(), "blocks", self.storage.window

    def prepare(self, plan: Plan, sink_logits: torch.Tensor | None = None) -> Plan:
        if not plan.boundaries:
            return plan
        for sealing in plan.boundaries:
            self.storage.seal(sealing.start, sealing.rows, sealing.batch_size)
        return plan.without_boundaries

    def _write(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> None:
        start = step.read.stop - step.consecutive.T
        if step.queries.start and (n := self.storage.sealed(start)) > self.storage.sealed(start - 1):
            self.storage.seal(n - self.storage.window, rows, len(new.key))
        if new.recording:
            self.storage.keep_graph(new.key[:, :, step.write], new.value[:, :, step.write], start, rows)
        super()._write(step, rows, new)

    def _keys_values(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> KeysAndValues:
        return self.storage.tokens(step.sealed.counts[0], step.read.stop, len(new.key), rows)

    def refill(self, row_fields: tuple[tuple[int, ...], ...], key: torch.Tensor, value: torch.Tensor) -> None:
        super().refill(row_fields, key[:, :, :0], value[:, :, :0])
        key, value = key.to(self.dtype), value.to(self.dtype)
        for row, length in enumerate(self.row_lengths):
            if length:
                place, own = torch.tensor([row], device=key.device), (slice(row, row + 1), slice(None), slice(length))
                self.storage.set(key[own], value[own], torch.arange(length, device=key.device), place)
                if torch.is_grad_enabled():
                    self.storage.keep_graph(key[own], value[own], 0, place)

    # -- going back

    def rewind_limit(self, row: int) -> int:
        encoded = self.storage.sealed(self.row_lengths[row] - 1)
        return encoded + self.storage.window + 1 if encoded else 0

    @property
    def max_rewindable_tokens(self) -> int:
        rooms = (self._next_cut(length) - length - 1 for length in self.row_lengths or (0,))
        return max(0, min(super().max_rewindable_tokens, *rooms))
