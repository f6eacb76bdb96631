"""Caches whose policy scores tokens, and keeps the best."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch

from litgpt.config import Config
from litgpt.kernels import ops
from litgpt.kernels.structs import Look, ScoredCache, SlotBuffer, Vectors, address
from litgpt.keys_and_values import KeysAndValues
from litgpt.kvcache.base import KVCache
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.plan import Boundary, Part, Plan, Step, Unplanned
from litgpt.kvcache.planned import PlannedKVCache, RowState
from litgpt.kvcache.policies.base import Policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.score_plan import plan_score_call
from litgpt.kvcache.storages import Storage
from litgpt.kvcache.storages.base import check_state, move_rows, write_slots
from litgpt.kvcache.storages.default import DefaultStorage
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
    comes after it sees what is stored. Arguments as for `PlannedKVCache`.

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
        self._has_row_state = policy.row_state(self.get_params()) > 0
        self._make_own_buffers(self.get_params())

    def _make_own_buffers(self, params: KVCacheParams) -> None:
        """Those next to the storage's."""
        with torch.inference_mode(False):  # buffers outlive the call that makes them
            for name, (shape, dtype) in _own_buffers(self.policy, params).items():
                self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=self.device), persistent=False)

    @classmethod
    def made_of(
        cls, policy: Policy, storage: type[Storage], storage_args: Mapping[str, Any] | None = None
    ) -> "type[PlannedKVCache]":
        name = type(policy).__name__.removesuffix("Policy") + "KVCache"
        args = dict(storage_args or {})
        return cls._derived(name, policy.key, STORAGE=storage, STORAGE_ARGS=args, POLICY=policy)

    def _apply(self, *args: Any, **kwargs: Any) -> "ScoreKVCache":
        exact = {
            name: x for name, x in self.named_buffers(recurse=False) if x.dtype == torch.float32 and name != "queries"
        }
        super()._apply(*args, **kwargs)
        for name, x in exact.items():  # sums stay float32, whatever the model becomes
            setattr(self, name, x.to(self.device))
        return self

    # -- what is in it

    @property
    def current_length(self) -> int:
        return max(self._rows.fields[1], default=0)

    def token_positions(self) -> torch.Tensor:
        used = self.current_length
        lengths, filled, evicted_at, _ = torch.tensor(self._rows.fields, device=self.device).view(4, -1, 1, 1).unbind()
        held = torch.where(evicted_at > 0, self.policy.kept, 0)
        positions = self._positions(None, len(self._rows.lengths), used, held, lengths - filled)
        return positions.masked_fill(torch.arange(used, device=self.device) >= filled, -1)

    def _positions(
        self, rows: torch.Tensor | None, batch: int, used: int, held: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        """Positions in the first `used` slots, (B, G, used); arguments as in `Boundary`."""
        slots = torch.arange(used, device=self.device)
        return torch.where(slots < held, _rows(self.positions, rows, batch)[..., :used].long(), slots + shift)

    def size_estimate(self) -> tuple[int, dict[str, int]]:
        parts = self.storage.size_in_bits() | {
            name: 8 * x.numel() * x.element_size() for name, x in self.named_buffers(recurse=False)
        }
        return sum(parts.values()), parts

    @classmethod
    def size_estimate_apriori(
        cls,
        params: KVCacheParams,
        storage: type[Storage] | None = None,
        policy: ScorePolicy | None = None,
        **storage_args: Any,
    ) -> tuple[int, dict[str, int]]:
        """As `PlannedKVCache.size_estimate_apriori`, and for a `policy` (None: that of the class, with as many slots as `params`)."""
        policy = cls.POLICY if policy is None else policy
        if policy is None:
            raise ValueError(f"{cls.__name__} is for many policies: say which `policy` it is")
        if policy.cache_length != params.cache_length:
            policy = replace(policy, cache_length=params.cache_length)
        _, parts = super().size_estimate_apriori(params, storage, **storage_args)
        for name, (shape, dtype) in _own_buffers(policy, params).items():
            parts[name] = 8 * dtype.itemsize * torch.Size(shape).numel()
        return sum(parts.values()), parts

    def kept_queries(self) -> torch.Tensor | None:
        return self._buffers.get("queries")  # not `self.queries`: see `DefaultStorage.kernel_view`

    def kept_numbers(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The positions of tokens that stayed (batch_size, G, C), and the policy's numbers of them, if there are any."""
        return self._buffers["positions"], self._buffers.get("slot_state")

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

    def commit(self, plan: Plan) -> None:
        """Note that `plan` was run."""
        self._rows.fields = plan.fields_after

    def prepare(self, plan: Plan, sink_logits: torch.Tensor | None = None) -> Plan:
        if not plan.boundaries:
            return plan
        for boundary in plan.boundaries:
            self._look(boundary, sink_logits)
        return self.prepared(plan)

    def prepared(self, plan: Plan) -> Plan:
        """Note that the boundaries of `plan` are behind. Returns what is left of it."""
        self._rows.fields = plan.fields_prepared
        return plan.without_boundaries

    def _run_part(self, part: Part, new: NewTokens) -> torch.Tensor:
        if part.tails is not None and not new.recording and self._has_kernel(part.tails, new):
            return self._run_tails(part.tails, part.rows, new)
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
        if not self._has_kernel(tails, new):
            return None
        log = self.positions.new_empty(len(pieces), 1, self.n_query_groups, self.cache_length)
        output = self._run_tails(tails, None, new, log)
        found = []
        for piece, positions in zip(pieces, log.long(), strict=True):
            before = piece.bounded or piece.row
            found.append(Found(piece.size, before.as_fields(), positions[..., : before.filled]))
        self._rows = RowState(*after.as_fields())
        return output.transpose(1, 2).flatten(2), found

    def _has_kernel(self, tails: Tails, new: NewTokens) -> bool:
        """Whether `_run_tails` is there for these."""
        return self.evicts_in_kernels() and ops.can_run_tails(*new[:4], tails.longest)

    def evicts_in_kernels(self) -> bool:
        """Whether kernels do all that happens to its tokens: the policy's looks too, and attention between them."""
        return type(self.storage) is DefaultStorage and self._looks_in_kernels()

    def _looks_in_kernels(self) -> bool:
        """Whether kernels score its tokens as the policy does, and move what is stored."""
        view = self._modules["storage"].kernel_view()
        return (
            view is not None
            and self.policy.pooled_by_kernels is not None
            and self.dtype == torch.bfloat16
            and self.mha.is_plain()
            and self.head_size <= ops.MAX_HEAD_SIZE
        )

    def _run_tails(
        self, tails: Tails, rows: torch.Tensor | None, new: NewTokens, log: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Output (B, H, T, D) of several steps by one kernel, with the looks between them."""
        cache = self._for_kernels(new.sink_logits)
        return ops.run_tails(*new[:3], cache, rows, (tails.held, tails.shift), tails.steps, log).transpose(1, 2)

    def _for_kernels(self, sink_logits: torch.Tensor | None) -> ScoredCache:
        """This cache as kernels see it: good as long as its buffers and `sink_logits` are."""
        policy, own, storage = self.policy, self._buffers, self._modules["storage"]
        queries, codes = own["queries"], storage.kernel_codes()
        return ScoredCache(
            *(self.n_head, self.n_query_groups, self.head_size, self.cache_length),
            *(policy.n_sink, policy.recent, policy.kept, policy.pooled, queries.shape[2]),
            *(self.mha.scale, self.mha.softcapping or 0.0),
            *map(address, (sink_logits, queries, own["positions"], own.get("slot_state"))),
            (SlotBuffer * 4)(*map(SlotBuffer.of, storage.slot_buffers())),
            Vectors() if codes is None else codes[0],
        )

    def can_look_by_kernels(self, sink_logits: torch.Tensor | None) -> bool:
        """Whether `look_for_kernels` is there for it."""
        return (
            self._looks_in_kernels()
            and ops.can_look(self._modules["storage"].kernel_view()[0])
            and (sink_logits is None or sink_logits.dtype == torch.bfloat16)
        )

    def look_for_kernels(self, boundary: Boundary, sink_logits: torch.Tensor | None) -> Look:
        """What happens at a boundary, for `ops.run_looks`."""
        return Look(
            self._for_kernels(sink_logits),
            boundary.batch_size,
            *map(address, (boundary.rows, boundary.held, boundary.shift)),
            *(boundary.filled, boundary.observed, boundary.query_slots.shape[-1], boundary.keep is not None),
        )

    def _run_step(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> torch.Tensor:
        if step.boundary is not None:
            self._look(step.boundary, new.sink_logits)
        output = super()._run_step(step, rows, new)
        if step.kept_queries is not None:
            write_slots(self.queries, new.query[:, :, step.kept_queries].detach(), step.query_slots, rows)
        return output

    def _look(self, boundary: Boundary, sink_logits: torch.Tensor | None) -> None:
        """Let the policy look at what is stored, and keep what it chooses."""
        if self.can_look_by_kernels(sink_logits):
            ops.run_looks([self.look_for_kernels(boundary, sink_logits)])
            return
        rows, batch, filled = boundary.rows, boundary.batch_size, boundary.filled
        row = torch.arange(batch, device=self.device) if rows is None else rows
        with torch.no_grad():
            queries = self.storage.get(batch, slice(0, 0), rows).keys()
            if self.policy.n_queries:
                queries = self.queries[row[:, None], :, boundary.query_slots].transpose(1, 2)
            tokens = CachedTokens(
                self.storage.get(batch, slice(0, filled), rows),
                self._positions(rows, batch, filled, boundary.held, boundary.shift),
                queries,
                boundary.query_positions,
                **self._own_state(rows, batch, filled, boundary.observed),
                block_idx=self.block_idx,
                mha=self.mha,
                sink_logits=sink_logits,
            )
            if self.policy.observes:
                self.policy.observe(tokens)
            index = None if boundary.keep is None else self.policy.best(tokens)
            self._note(tokens, index, rows, batch)
        if index is not None:
            if torch.is_grad_enabled() and any(buffer.requires_grad for buffer in self.storage.buffers()):
                self.storage.detach_writes()
            self.storage.compact(index, rows)

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
            tokens = CachedTokens(
                stored,
                positions,
                new.query,
                positions[0],
                **self._own_state(part.rows, B, T, 0),
                block_idx=self.block_idx,
                mha=self.mha,
                sink_logits=new.sink_logits,
            )
            if self.policy.observes:
                self.policy.observe(tokens)
            index = self.policy.best(tokens) if step.write is None else None
            self._note(tokens, index, part.rows, B)
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
        length = tokens.shape[2]
        with torch.no_grad():
            index = self.policy.best(tokens)
            self._note(tokens, index, None, 1)
            self._store_chosen(tokens.keys_values.keys(), tokens.keys_values.values(), index, None)
        self._rows = RowState((length,), (self.policy.kept,), (length,), (length,))

    def _own_state(self, rows: torch.Tensor | None, batch: int, used: int, observed: int) -> dict[str, torch.Tensor]:
        """The policy's numbers of the first `used` slots, zeros in all that it did not see yet."""
        slot_state = self.positions.new_zeros(
            (self.policy.slot_state, batch, self.n_query_groups, used), dtype=torch.float32
        )
        if self.policy.slot_state and observed:
            slot_state[..., :observed] = _rows(self.slot_state, rows, batch)[..., :observed].transpose(0, 1)
        row_state = slot_state[:0]
        if self._has_row_state:
            row_state = _rows(self.row_state, rows, batch)
            row_state = row_state if observed else torch.zeros_like(row_state)
        return {"slot_state": slot_state, "row_state": row_state}

    def _note(self, tokens: CachedTokens, index: torch.Tensor | None, rows: torch.Tensor | None, batch: int) -> None:
        """Keep the policy's numbers, and the positions of the tokens that stay (None: all)."""
        states = {"slot_state": tokens.slot_state.transpose(0, 1)} if self.policy.slot_state else {}
        if index is not None:
            positions = tokens.positions.expand(*index.shape[:2], -1).gather(2, index)
            states = {name: x.gather(3, index[:, None].expand(-1, x.shape[1], -1, -1)) for name, x in states.items()}
            states["positions"] = positions.int()
        if self._has_row_state:
            states["row_state"] = tokens.row_state
        for name, x in states.items():
            buffer = getattr(self, name)
            if rows is None:
                buffer[:batch, ..., : x.shape[-1]] = x
            else:
                buffer[rows, ..., : x.shape[-1]] = x

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
        move_rows(self.buffers(recurse=False), rows)

    def _takes_over(self, rows: RowState) -> bool:
        return False

    def _slots_in_use(self, row: int) -> int:
        return self._rows.fields[1][row]

    def _stored(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        return super()._stored(batch, used) | self._own_stored(batch, used)

    def _own_stored(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        by_slot = ("positions", "slot_state")
        return {
            name: x[:batch, ..., :used] if name in by_slot else x[:batch]
            for name, x in self.named_buffers(recurse=False)
        }

    def _load_stored(self, state: Mapping[str, Any], batch: int, used: int) -> None:
        own = self._own_stored(batch, used)
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
        if isinstance(cache, ScoreKVCache) and plan.boundaries and cache.can_look_by_kernels(sinks):
            looks += [cache.look_for_kernels(boundary, sinks) for boundary in plan.boundaries]
            ready.append(cache.prepared(plan))
        else:
            ready.append(cache.prepare(plan, sinks))
    if looks:
        ops.run_looks(looks)
    return ready


def _own_buffers(policy: ScorePolicy, params: KVCacheParams) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the buffers that such a cache has next to its storage's."""
    B, G, H, C = params.batch_size, params.n_query_groups, params.n_head, params.cache_length
    F = policy.row_state(params)
    dtype = torch.get_default_dtype() if params.dtype is None else params.dtype
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"positions": ((B, G, C), torch.int32)}
    if policy.slot_state:
        buffers["slot_state"] = (B, policy.slot_state, G, C), torch.float32
    if policy.n_queries:
        buffers["queries"] = (B, H, policy.n_queries, params.head_size), dtype
    if F:
        buffers["row_state"] = (B, H, F), torch.float32
    return buffers


def _rows(buffer: torch.Tensor, rows: torch.Tensor | None, batch: int) -> torch.Tensor:
    return buffer[:batch] if rows is None else buffer[rows]
