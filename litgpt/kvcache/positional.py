"""Caches whose policy looks at positions only."""

from collections.abc import Sequence
from typing import Any

import torch

from litgpt.config import Config
from litgpt.kernels.row_attention import Seen
from litgpt.keys_and_values import KeysAndValues
from litgpt.kvcache.plan import Plan
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.policies import PositionalPolicy
from litgpt.kvcache.positional_plan import plan_call
from litgpt.kvcache.row_state import RowState


class PositionalKVCache(PlannedKVCache):
    """Stores the tokens that a policy of positions keeps; arguments as for `ComposedKVCache`.

    Next to its length, a row has the position below which tokens are gone, those among the policy's first `n_sink` aside.
    """

    ROW_FIELDS = ("lengths", "oldest")
    policy: PositionalPolicy

    def __init__(
        self, config: Config, batch_size: int, policy: PositionalPolicy, block_idx: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, batch_size, policy, block_idx, *args, **kwargs)
        self.window = config.window(block_idx)

    # -- what is in it

    @property
    def current_length(self) -> int:
        return min(self.next_token_pos, self.cache_length)

    @property
    def unbounded(self) -> bool:
        return self.policy.evicts and not self.policy.n_sink and self.cache_length <= self.config.block_size

    def is_chunk_invariant(self, length: int) -> bool:
        within_window = self.window is not None and self.window <= self.policy.reach
        return not self.policy.evicts or within_window or super().is_chunk_invariant(length)

    def token_positions(self) -> torch.Tensor:
        lengths, oldest = torch.tensor(self._rows.fields, device=self.device, dtype=torch.int64).unbind()
        positions = self.policy.slot_positions(lengths)[:, : self.current_length]
        gone = (positions >= self.policy.n_sink) & (positions < oldest[:, None])
        return positions.masked_fill(gone, -1)[:, None, :].expand(-1, self.n_query_groups, -1)

    # -- one call

    def plan(
        self,
        input_pos: int,
        batch_size: int,
        T: int | Sequence[int],
        rows: Sequence[int] | None = None,
        static: bool = False,
    ) -> Plan:
        lengths = self._check_call(input_pos, batch_size, T, rows)
        return plan_call(self.policy, self.window, lengths, rows, T, self.dtype, self.device, static)

    def plan_key(self) -> tuple:
        return self._policy_key, self.window, self._rows.lengths, *self._place

    def fields_after(self, plan: Plan) -> tuple[tuple[int, ...], ...]:
        oldest = (0,) * len(plan.after)
        if self.policy.evicts:
            old = (self._rows.fields[1] + oldest)[: len(oldest)]
            oldest = tuple(
                max(gone if before else 0, after - self.policy.reach)
                for gone, before, after in zip(old, plan.before, plan.after, strict=True)
            )
        return plan.after, oldest

    def take_over(self, keys_values: KeysAndValues, length: int) -> None:
        """Hold what the policy keeps of the `length` tokens of the only row, which was empty."""
        positions = torch.tensor([p for some in self.policy.cached_positions(length) for p in some], device=self.device)
        chosen = keys_values.keys()[:, :, positions], keys_values.values()[:, :, positions]
        self.storage.set(*chosen, self.policy.slots(positions), None)
        self._rows = RowState((length,), (max(0, length - self.policy.reach) if self.policy.evicts else 0,))

    # -- state between calls

    def rewind_limit(self, row: int) -> int:
        # what is gone is gone by the longest that the row ever was, also after a crop
        longest = max(self._rows.lengths[row], self._rows.fields[1][row] + self.policy.reach)
        return self.policy.crop_limit(longest, self.window)

    def _shortened(self, lengths: tuple[int, ...]) -> RowState:
        return RowState(lengths, self._rows.fields[1])

    def _takes_over(self, rows: RowState) -> bool:
        return not any(rows.fields[1])

    @property
    def max_rewindable_tokens(self) -> int:
        seen = self.policy.reach if self.window is None else min(self.window, self.policy.reach)
        late = self.policy.reach - seen + 2 if self.policy.evicts else 0  # once tokens are evicted
        room = self.cache_length - self.next_token_pos
        evicted = any(oldest > self.policy.n_sink for oldest in self._rows.fields[1])
        return max(0, min(self.cache_length, late if evicted else max(room, late)) - 1)


def seen_by_position(policy: PositionalPolicy, window: int | None) -> Seen | None:
    """What tokens after the first call see in a layer with a `window`, where it is as simple."""
    if not policy.evicts:
        return Seen.within(window)
    if window is None:
        return Seen(policy.reach, policy.n_sink)
    return None if policy.n_sink else Seen(min(window, policy.reach))
