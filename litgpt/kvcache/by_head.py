"""Caches of score policies whose heads keep different numbers of tokens, in memory for as many."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.plan import Boundary, Plan, Step
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.policy_state import PolicyState
from litgpt.kvcache.score import ScoreKVCache
from litgpt.kvcache.tokens import CachedTokens
from litgpt.masks import Consecutive


@dataclass(frozen=True)
class Head:
    """One of a cache's heads of keys and values.

    Attributes:
        g: its number.
        queries: the heads of queries that attend to it.
        policy: with its number of slots.
        first: its first slot, of those of all heads.
        extra: how many tokens more than the mean stay in it.
    """

    g: int
    queries: slice
    policy: ScorePolicy
    first: int
    extra: int

    @property
    def kept(self) -> slice:
        """Slots of the tokens that stay."""
        return slice(self.first, self.first + self.policy.kept)

    @property
    def slots(self) -> slice:
        """All of its slots."""
        return slice(self.first, self.first + self.policy.cache_length)

    def boundary(self, boundary: Boundary) -> Boundary:
        """What a boundary of the cache, which has one row, is for this head."""
        return replace(
            boundary,
            rows=None,
            filled=boundary.filled + self.extra,
            observed=boundary.observed + self.extra,
            held=boundary.held + self.extra,
            shift=boundary.shift - self.extra,
        )


class ByHeadKVCache(ScoreKVCache):
    """A cache of one row that is like others of its policy until `hold` gives each head a number of slots of its own. A second
    reading of a prompt does (`litgpt.engine.second_reading`), by `share_slots`; an empty cache is like others again.

    The heads then lie one after the other, as one head of a storage for all of their slots. All tails are equally long, so they
    fill up and are emptied together, and plans are those of a cache with as many slots in every head: what is slot j there is
    slot j + `extra` of a head.
    """

    def __init__(self, config: Any, batch_size: int, *args: Any, **kwargs: Any) -> None:
        if batch_size > 1:
            raise ValueError(
                f"caches with budget='scores' are for one sequence at a time, not for {batch_size}: use batch_size=1, or "
                "another budget"
            )
        super().__init__(config, batch_size, *args, **kwargs)
        self.heads: tuple[Head, ...] = ()  # empty: all have as many slots

    @property
    def kept_by_head(self) -> tuple[int, ...]:
        """How many tokens stay in each head; empty where there are as many in all of them."""
        return tuple(head.policy.kept for head in self.heads)

    def hold(self, kept: Sequence[int]) -> None:
        """Have slots for so many tokens that stay in each head, and the tail; or, if there are none, as many in every head. What
        is stored is lost."""
        kept = tuple(kept)
        if kept == self.kept_by_head:
            return
        least, tail = self.policy.n_sink + self.policy.recent, self.policy.tail
        if kept and (len(kept) != self.n_query_groups or min(kept) < least):
            raise ValueError(f"{self.n_query_groups} heads keep at least {least} tokens each, got {list(kept)}")
        heads, first, group = [], 0, self.n_head // self.n_query_groups
        for g, n in enumerate(kept):
            policy = replace(self.policy, cache_length=n + tail)
            heads.append(Head(g, slice(g * group, (g + 1) * group), policy, first, n - self.policy.kept))
            first += n + tail
        params = self.get_params()
        if kept:
            params = replace(params, n_query_groups=1, cache_length=first)
        self.storage = type(self.storage)(params, **self._storage_args)
        self.policy_state = PolicyState(self.policy, params)
        self._set_heads(tuple(heads))

    def _set_heads(self, heads: tuple[Head, ...]) -> None:
        self.heads = heads
        self.head_slots = torch.tensor([[getattr(head, name) for head in heads] for name in ("first", "extra")])
        if not heads:
            self.head_slots = None

    # -- what is in it

    @property
    def n_slots(self) -> int:
        """Of all heads together."""
        return sum(head.policy.cache_length for head in self.heads) or self.n_query_groups * self.cache_length

    @property
    def takes_rows_apart(self) -> bool:
        return False  # there is one

    @property
    def current_length(self) -> int:
        return super().current_length + max((head.extra for head in self.heads if self._rows.lengths), default=0)

    def token_positions(self) -> torch.Tensor:
        if not self.heads:
            return super().token_positions()
        (length,), (filled,), *_ = self._rows.fields
        positions = torch.full((1, self.n_query_groups, self.current_length), -1, device=self.device)
        for head in self.heads:
            own, tail = positions[0, head.g], filled - self.policy.kept
            own[: head.policy.kept] = self.policy_state.positions[0, 0, head.kept]
            own[head.policy.kept :][:tail] = torch.arange(length - tail, length, device=self.device)
        return positions

    def get_keys_values(self) -> KeysAndValues | None:
        if not self.heads:
            return super().get_keys_values()
        G, N, filled = self.n_query_groups, self.current_length, super().current_length
        stored = [self._stored_in(head, filled + head.extra) for head in self.heads]
        keys, values = (
            torch.zeros(1, G, N, x.shape[-1], dtype=x.dtype, device=x.device)
            for x in (stored[0].keys(), stored[0].values())
        )
        for g, of_head in enumerate(stored):
            own = of_head.keys()
            keys[0, g, : own.shape[2]], values[0, g, : own.shape[2]] = own[0, 0], of_head.values()[0, 0]
        return DefaultKeysAndValues(keys, values)

    def _stored_in(self, head: Head, used: int) -> KeysAndValues:
        """What is in the first `used` slots of a head."""
        return self.storage.get(1, slice(head.first, head.first + used))

    # -- one call

    def plan(self, *args: Any, static: bool = False) -> Plan:
        if static:
            raise ValueError(
                "caches with budget='scores' do not run in compiled code: leave out --compile, or the budget"
            )
        return super().plan(*args)

    def prepare(self, plan: Plan, sink_logits: torch.Tensor | None = None) -> Plan:
        if not any(plan.before):
            self.hold(())
        return super().prepare(plan, sink_logits)

    def _write(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> None:
        if not self.heads:
            return super()._write(step, rows, new)
        if new.recording:
            self.storage.detach_writes()
        slots = torch.cat([step.slots + (head.first + head.extra) for head in self.heads])
        self.storage.set(*(x[:, :, step.write].flatten(1, 2)[:, None] for x in (new.key, new.value)), slots, None)

    def _attend(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> torch.Tensor:
        if not self.heads:
            return super()._attend(step, rows, new)
        outputs, sinks = [], new.sink_logits
        for head in self.heads:
            seen = step.read.stop + head.extra
            consecutive = Consecutive(step.consecutive.T, seen, None, self.dtype, self.device)
            own = new.query[:, head.queries, step.queries], self._stored_in(head, seen), consecutive
            own_sinks = None if sinks is None else sinks[head.queries]
            outputs.append(self.mha.attend_consecutive(*own, sink_logits=own_sinks)[0])
        return torch.cat(outputs, dim=1)

    def _look(self, boundary: Boundary, sink_logits: torch.Tensor | None) -> None:
        if not self.heads:
            return super()._look(boundary, sink_logits)
        index = torch.arange(self.n_slots, device=self.device)
        with torch.no_grad():
            for head in self.heads:
                own, state = head.boundary(boundary), self._state_of(head)
                sinks = None if sink_logits is None else sink_logits[head.queries]
                tokens = self._tokens_at(own, self._stored_in(head, own.filled), state, sinks)
                index[head.kept] = head.first + state.choose(tokens, None, True)[0, 0]
        self.storage.compact(index[None, None])

    def _store_best(self, tokens: CachedTokens, *args: Any) -> None:
        if not self.heads:
            return super()._store_best(tokens, *args)
        keys, values = tokens.keys_values.keys(), tokens.keys_values.values()
        for head in self.heads:
            own = replace(
                tokens,
                keys_values=DefaultKeysAndValues(keys[:, head.g, None], values[:, head.g, None]),
                slot_state=tokens.slot_state[:, :, head.g, None],
            )
            super()._store_best(own, self._state_of(head), head.first)

    def _state_of(self, head: Head) -> PolicyState:
        return self.policy_state.of_head(head.policy, head.slots, head.queries)

    # -- state between calls

    def clear(self) -> None:
        super().clear()
        self.hold(())

    def start(self, batch_size: int) -> None:
        super().start(batch_size)
        self.hold(())

    def rewind(self, counts: Sequence[int]) -> None:
        super().rewind(counts)
        if not any(self.row_lengths):
            self.hold(())

    def fork(self) -> "ByHeadKVCache":
        other = self.empty_copy()
        other.load_state(self.state(copy=False))
        return other

    def state(self, row: int | None = None, copy: bool = True) -> dict[str, Any]:
        state = super().state(row, copy)
        return state | {"kept_by_head": list(self.kept_by_head)} if self.heads else state

    def load_state(self, state: Mapping[str, Any], row: int | None = None) -> None:
        with self._held_as_in(state):
            super().load_state(state, row)

    @contextmanager
    def _held_as_in(self, state: Mapping[str, Any]) -> Iterator[None]:
        """Slots as a state needs them; if it cannot be loaded, those that there were, with what they hold."""
        before = self.storage, self.policy_state, self.heads
        self.hold(state.get("kept_by_head", ()))
        try:
            yield
        except ValueError:
            self.storage, self.policy_state, heads = before
            self._set_heads(heads)
            raise

    def _stored(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        return super()._stored(batch, self.n_slots if self.heads else used)

    def _load_stored(self, state: Mapping[str, Any], batch: int, used: int) -> None:
        super()._load_stored(state, batch, self.n_slots if self.heads else used)


def share_slots(caches: Sequence[ByHeadKVCache], tokens: Sequence[CachedTokens]) -> None:
    """Let the heads of all caches have the slots of all of them by their scores: those tokens stay, all heads together, that score
    best, next to the first and the newest ones of every head.

    Args:
        caches: of one policy, and empty.
        tokens: what each may keep of one text.
    """
    ranks = [cache.policy.ranks(of_cache)[0] for cache, of_cache in zip(caches, tokens, strict=True)]
    flat = torch.cat([of_cache.flatten().to(ranks[0].device) for of_cache in ranks]).long()
    n_heads, length = sum(map(len, ranks)), ranks[0].shape[1]
    order = flat << 32 | torch.arange(len(flat), device=flat.device)  # all different
    best = order.topk(n_heads * caches[0].policy.kept, sorted=False).indices
    kept = torch.bincount(best // length, minlength=n_heads).tolist()
    for cache in caches:
        own, kept = kept[: cache.n_query_groups], kept[cache.n_query_groups :]
        cache.hold(own)
