"""Caches whose policy scores tokens, and keeps the best."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch

from litgpt.config import Config
from litgpt.kernels import ops
from litgpt.keys_and_values import KeysAndValues
from litgpt.kvcache.base import KVCache
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.plan import Boundary, Part, Plan, Step, Unplanned
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.policies.base import Policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.policy_state import PolicyState
from litgpt.kvcache.row_state import RowState
from litgpt.kvcache.score_kernels import can_look, can_run_tails, look_of, run_tails
from litgpt.kvcache.score_plan import plan_score_call
from litgpt.kvcache.storages import Storage
from litgpt.kvcache.storages.base import check_state
from litgpt.kvcache.tails import RowNumbers, Tails, cut
from litgpt.kvcache.tokens import CachedTokens


class Found(NamedTuple):
    """What `size` tokens of a step find in a cache: the numbers of its rows, and the positions in its slots (B, G, n)."""

    size: int
    fields: tuple[tuple[int, ...], ...]
    positions: torch.Tensor


class ScoreKVCache(PlannedKVCache):
    """Appends tokens until all slots are taken, and then keeps those that a policy scores best, in every row and head its own.

    When that happens, the host knows: see `litgpt.kvcache.score_plan`. A prefill attends to its whole prompt, however long; what
    comes after it sees what is stored. Arguments as for `ComposedKVCache`.

    A row can go back to its last eviction, or for a policy that sums up what queries see, to when it last looked.
    """

    ROW_FIELDS = ("lengths", "filled", "evicted_at", "observed_at")
    POLICY: ClassVar[ScorePolicy | None] = None  # in the class for a policy, see `made_of`
    policy: ScorePolicy

    def __init__(
        self, config: Config, batch_size: int, policy: ScorePolicy, block_idx: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, batch_size, policy, block_idx, *args, **kwargs)
        if config.window(block_idx) is not None:
            raise ValueError(
                f"layer {block_idx} has a sliding window, which says what stays: {type(policy).__name__} is for the others"
            )
        if policy.unrotates and config.latent_attention is not None:
            raise ValueError(f"{type(policy).__name__} needs keys before RoPE, which latent attention does not have")
        if policy.n_queries > policy.cache_length:
            raise ValueError(
                f"{type(policy).__name__} needs the queries of {policy.n_queries} tokens, more than cache_length="
                f"{policy.cache_length}"
            )
        self.policy_state = PolicyState(policy, self.get_params())

    @classmethod
    def made_of(
        cls, policy: Policy, storage: type[Storage], storage_args: Mapping[str, Any] | None = None
    ) -> "type[PlannedKVCache]":
        name = type(policy).__name__.removesuffix("Policy") + "KVCache"
        args = dict(storage_args or {})
        return cls._derived(name, policy.key, STORAGE=storage, STORAGE_ARGS=args, POLICY=policy)

    # -- what is in it

    @property
    def current_length(self) -> int:
        return max(self._rows.fields[1], default=0)

    def token_positions(self) -> torch.Tensor:
        used = self.current_length
        lengths, filled, evicted_at, _ = torch.tensor(self._rows.fields, device=self.device).view(4, -1, 1, 1).unbind()
        held = torch.where(evicted_at > 0, self.policy.kept, 0)
        positions = self.policy_state.positions_in(None, len(self._rows.lengths), used, held, lengths - filled)
        return positions.masked_fill(torch.arange(used, device=self.device) >= filled, -1)

    def size_estimate(self) -> tuple[int, dict[str, int]]:
        parts = self.storage.size_in_bits() | self.policy_state.size_in_bits()
        return sum(parts.values()), parts

    @classmethod
    def size_estimate_apriori(
        cls,
        params: KVCacheParams,
        storage: type[Storage] | None = None,
        policy: ScorePolicy | None = None,
        **storage_args: Any,
    ) -> tuple[int, dict[str, int]]:
        """As `ComposedKVCache.size_estimate_apriori`, and for a `policy` (None: that of the class, with as many slots as `params`)."""
        policy = cls.POLICY if policy is None else policy
        if policy is None:
            raise ValueError(f"{cls.__name__} is for many policies: say which `policy` it is")
        if policy.cache_length != params.cache_length:
            policy = replace(policy, cache_length=params.cache_length)
        _, parts = super().size_estimate_apriori(params, storage, **storage_args)
        parts |= PolicyState.size_in_bits_apriori(policy, params)
        return sum(parts.values()), parts

    def kept_queries(self) -> torch.Tensor | None:
        return self._modules["policy_state"].kept_queries()  # not `self.policy_state`: see `DefaultStorage.kernel_view`

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
        known = list(zip(*self._rows.fields, strict=True))
        state = [RowNumbers(*known[row]) if length else RowNumbers() for row, length in enumerate(lengths)]
        return plan_score_call(self.policy, state, rows, T, self.dtype, self.device, static)

    def plan_key(self) -> tuple:
        return self._policy_key, self._rows.fields, *self._place

    def fields_after(self, plan: Plan) -> tuple[tuple[int, ...], ...]:
        return plan.fields_after

    def prepare(self, plan: Plan, sink_logits: torch.Tensor | None = None) -> Plan:
        if not plan.boundaries:
            return plan
        for boundary in plan.boundaries:
            self._look(boundary, sink_logits)
        return self.prepared(plan)

    def prepared(self, plan: Plan) -> Plan:
        """Note that the boundaries of `plan` are behind. Returns what is left of it."""
        self._rows = RowState(*plan.fields_prepared)
        return plan.without_boundaries

    def _run_part(self, part: Part, new: NewTokens) -> torch.Tensor:
        if part.tails is not None and not new.recording and can_run_tails(self, part.tails, new):
            return run_tails(self, part.tails, part.rows, new)
        output = super()._run_part(part, new)
        if part.steps[0].prompt:
            self.look_at_prompt(part, new, self.storage.as_stored(new.key, new.value))
        return output

    def run_noted(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_logits: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Found]] | None:
        """All of a call for new tokens of the only row, which is not empty: the output (1, T, H * D), and what the tokens of every step
        find. None, and nothing is done, where that takes a call for each of them."""
        if len(self._rows.lengths) != 1 or not self._rows.lengths[0] or self.watch is not None:
            return None
        row = RowNumbers(*(of_rows[0] for of_rows in self._rows.fields))
        pieces, after = cut(self.policy, row, key.shape[2])
        tails, new = Tails(self.policy, pieces, [row], prepared=False), NewTokens(query, key, value, sink_logits)
        if not can_run_tails(self, tails, new):
            return None
        log = self.policy_state.positions.new_empty(len(pieces), 1, self.n_query_groups, self.cache_length)
        output = run_tails(self, tails, None, new, log)
        found = []
        for piece, positions in zip(pieces, log.long(), strict=True):
            before = piece.bounded or piece.row
            found.append(Found(piece.size, before.as_fields(), positions[..., : before.filled]))
        self._rows = RowState(*after.as_fields())
        return output.transpose(1, 2).flatten(2), found

    def _run_step(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> torch.Tensor:
        if step.boundary is not None:
            self._look(step.boundary, new.sink_logits)
        output = super()._run_step(step, rows, new)
        self.policy_state.keep_queries(step, rows, new.query)
        return output

    def _look(self, boundary: Boundary, sink_logits: torch.Tensor | None) -> None:
        """Let the policy look at what is stored, and keep what it chooses."""
        if can_look(self, sink_logits):
            ops.run_looks([look_of(self, boundary, sink_logits)], self.dtype)
            return
        with torch.no_grad():
            stored = self.storage.get(boundary.batch_size, slice(0, boundary.filled), boundary.rows)
            tokens = self._tokens_at(boundary, stored, self.policy_state, sink_logits)
            index = self.policy_state.choose(tokens, boundary.rows, boundary.keep is not None)
        if index is not None:
            if torch.is_grad_enabled() and any(buffer.requires_grad for buffer in self.storage.buffers()):
                self.storage.detach_writes()
            self.storage.compact(index, boundary.rows)

    def _tokens_at(
        self, boundary: Boundary, stored: KeysAndValues, state: PolicyState, sink_logits: torch.Tensor | None
    ) -> CachedTokens:
        """What a policy is shown at a boundary, of tokens that are `stored`."""
        rows, batch, filled = boundary.rows, boundary.batch_size, boundary.filled
        positions = state.positions_in(rows, batch, filled, boundary.held, boundary.shift)
        queries = state.queries_at(boundary)
        if queries is None:
            queries = self.storage.get(batch, slice(0, 0), rows).keys()
        numbers, layer = state.numbers(rows, batch, filled, boundary.observed), (self.block_idx, self.mha)
        return CachedTokens(stored, positions, queries, boundary.query_positions, *numbers, *layer, sink_logits)

    def look_at_prompt(self, part: Part, new: NewTokens, stored: KeysAndValues | None = None) -> None:
        """Let the policy look at whole prompts that have attended, and store what it chooses, unless all of them is stored already.
        `stored` are their keys and values as a storage gives them (None: they are read back, if all of them is stored)."""
        step, (B, _, T, _) = part.steps[0], new.key.shape
        positions = torch.arange(T, device=new.key.device).view(1, 1, T)
        with torch.no_grad():
            if stored is None and step.write is None:
                stored = self.storage.as_stored(new.key, new.value)
            elif stored is None:
                stored = self.storage.get(B, slice(0, T), part.rows)
            numbers, layer = self.policy_state.numbers(part.rows, B, T, 0), (self.block_idx, self.mha)
            tokens = CachedTokens(stored, positions, new.query, positions[0], *numbers, *layer, new.sink_logits)
            index = self.policy_state.choose(tokens, part.rows, step.write is None)
        if index is not None:
            if new.recording:
                self.storage.detach_writes()
            self._store_chosen(new.key, new.value, index, part.rows)

    def _store_chosen(
        self, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None, first: int = 0
    ) -> None:
        """Store those of keys and values (B, G, T, D) that `index` (B, G, n) names, in slots from `first` on."""
        chosen = [x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (key, value)]
        self.storage.set(*chosen, torch.arange(first, first + index.shape[-1], device=key.device), rows)

    def tokens_read(self, keys_values: KeysAndValues, slot_state: torch.Tensor) -> CachedTokens:
        """Tokens that the only row, which is empty, may keep, by the policy's own numbers for them (S, 1, G, N)."""
        positions = torch.arange(slot_state.shape[-1], device=self.device).view(1, 1, -1)
        no_queries = keys_values.keys()[:, :, :0], positions[0, :, :0]
        return CachedTokens(keys_values, positions, *no_queries, slot_state, slot_state[:0], self.block_idx, self.mha)

    def take_over(self, tokens: CachedTokens) -> None:
        """Hold the best of such tokens, which are more than `cache_length`."""
        with torch.no_grad():
            self._store_best(tokens, self.policy_state)
        length = (tokens.shape[2],)
        self._rows = RowState(length, (self.policy.kept,), length, length)

    def _store_best(self, tokens: CachedTokens, state: PolicyState, first: int = 0) -> None:
        index = state.policy.best(tokens)
        state.note(tokens, index, None)
        self._store_chosen(tokens.keys_values.keys(), tokens.keys_values.values(), index, None, first)

    def uninterrupted_tokens(self, row: int) -> int | None:
        length, filled, _, observed_at = (of_rows[row] for of_rows in self._rows.fields)
        if length == 0:
            return None
        room = self.policy.room(filled, length - observed_at)
        if room:
            return room
        return self.policy.room(self.policy.kept if filled == self.policy.cache_length else filled, 0)

    # -- state between calls

    def rewind_limit(self, row: int) -> int:
        _, _, evicted_at, observed_at = self._rows.fields
        return (observed_at if self.policy.observes else evicted_at)[row]

    @property
    def max_rewindable_tokens(self) -> int:
        rooms = [
            self.policy.room(filled, length - observed_at) or self.policy.tail
            for length, filled, _, observed_at in zip(*self._rows.fields, strict=True)
        ]
        return min(rooms, default=self.policy.longest_prompt) - 1

    def _shortened(self, lengths: tuple[int, ...]) -> RowState:
        before, filled, *others = self._rows.fields
        filled = tuple(used - (old - new) for used, old, new in zip(filled, before, lengths, strict=True))
        return RowState(lengths, filled, *others)

    @torch.no_grad()
    def fork(self) -> "ScoreKVCache":
        other = self.empty_copy()
        for copied, buffer in zip(other.buffers(), self.buffers(), strict=True):
            copied.copy_(buffer)
        other._rows = RowState(*self._rows.fields)
        return other

    def reorder(self, rows: Iterable[int]) -> None:
        rows = [int(row) for row in rows]
        super().reorder(rows)
        self.policy_state.select_rows(rows)

    def _takes_over(self, rows: RowState) -> bool:
        return False

    def _slots_in_use(self, row: int) -> int:
        return self._rows.fields[1][row]

    def _stored(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        return super()._stored(batch, used) | self.policy_state.state(batch, used)

    def _load_stored(self, state: Mapping[str, Any], batch: int, used: int) -> None:
        own = self.policy_state.state(batch, used)
        check_state(state, own)
        super()._load_stored(state, batch, used)
        for name, target in own.items():
            target.copy_(state[name])


def prepare_all(
    caches: Sequence[KVCache], plans: Sequence[Plan | Unplanned], sink_logits: Sequence[torch.Tensor | None]
) -> list[Plan | Unplanned]:
    """What `prepare` of each cache does and returns, with all looks of kernels in one call."""
    looks, ready = [], []
    for cache, plan, sinks in zip(caches, plans, sink_logits, strict=True):
        if isinstance(cache, ScoreKVCache) and plan.boundaries and can_look(cache, sinks):
            looks += [look_of(cache, boundary, sinks) for boundary in plan.boundaries]
            dtype = cache.dtype
            ready.append(cache.prepared(plan))
        else:
            ready.append(cache.prepare(plan, sinks))
    if looks:
        ops.run_looks(looks, dtype)
    return ready
