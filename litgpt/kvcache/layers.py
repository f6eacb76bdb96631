"""The caches of all layers of a model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from litgpt.config import Config
from litgpt.kvcache import changes
from litgpt.kvcache.base import KVCache
from litgpt.kvcache.lockstep import Lockstep, group
from litgpt.kvcache.plan import Plan, Unplanned
from litgpt.kvcache.positional_plan import read_bucket
from litgpt.kvcache.score import prepare_all
from litgpt.kvcache.spec import CacheSpec, HasCaches


@dataclass(eq=False)
class LayerCaches:
    """The caches of all layers (or none), and what is known of the sequences in them.

    A model uses one such object at a time, replaced by one assignment. A change of all caches succeeds, or raises without
    changing any; after an interrupt they are empty.

    Attributes:
        caches: one a layer.
        default: made by `GPT.set_kv_caches`, which may replace them.
        expected_length: tokens that the sequences will have, if known.
        long_rope: with LongRoPE, whether the sequences are rotated by the long factors.
    """

    caches: list[KVCache] = field(default_factory=list)
    default: bool = False
    expected_length: int = 0
    long_rope: bool = False
    _inconsistent: bool = field(default=False, init=False)  # during a change of all caches, and after its interrupt
    _groups: list[Lockstep] = field(default_factory=list, init=False)  # caches with equal plans
    _grouped: tuple[object, Sequence[KVCache]] = field(default=(None, ()), init=False)  # when, and of which caches
    _memory: tuple[object, Sequence[KVCache], object] = field(
        default=(None, (), None), init=False
    )  # as `memory` gave it

    @staticmethod
    def assigned(caches: Iterable[KVCache], config: Config) -> "LayerCaches":
        """Caches made by the caller, checked.

        Raises:
            ValueError: if they do not fit the configuration or each other.
        """
        caches = list(caches)
        if len(caches) != config.n_layer:
            raise ValueError(f"need {config.n_layer} caches, one a layer, got {len(caches)}")
        for block_idx, cache in enumerate(caches):
            if not isinstance(cache, KVCache):
                raise ValueError(f"the cache of layer {block_idx} is a {type(cache).__name__}, which is no KVCache")
            for name, value, expected in (
                ("block_idx", cache.block_idx, block_idx),
                ("n_head", cache.n_head, config.n_head),
                ("n_query_groups", cache.n_query_groups, config.cache_groups),
                ("head_size", cache.head_size, config.cache_head_size),
                ("batch_size", cache.batch_size, caches[0].batch_size),
                ("dtype", cache.dtype, caches[0].dtype),
            ):
                if value != expected:
                    raise ValueError(f"the cache of layer {block_idx} has {name} = {value}, expected {expected}")
        return LayerCaches(caches)

    def defaults(
        self, model: HasCaches, batch_size: int, length: int, dtype: torch.dtype | None = None, static: bool = False
    ) -> "LayerCaches":
        """Default caches for `length` tokens to replace these; those that fit are cleared and reused.

        `static` adds a slot that is never read: compiled code distinguishes whole buffers from parts of them.
        """
        self.clear()
        dtype = model.dtype if dtype is None else dtype
        slots = read_bucket(length) + 1 if static else length
        caches = []
        for block_idx in range(model.config.n_layer):
            place = model.layer_device(block_idx), dtype
            same = self.caches[block_idx] if self.caches else None
            kind = CacheSpec().layer_policy(model.config, block_idx, slots)
            if same is None or (same.policy, same.batch_size, same.device, same.dtype) != (kind, batch_size, *place):
                same = CacheSpec().create_layer(model.config, batch_size, block_idx, slots, *place, mha=model.mha)
            caches.append(same)
        return replace(self, caches=caches, default=True)

    # -- contents and limits

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Number of tokens so far of every row in use."""
        self._recover()
        return self.caches[0].row_lengths if self.caches else ()

    @property
    def next_token_pos(self) -> int:
        """The `input_pos` of the next token, the same in all caches (0: empty, or no caches)."""
        return max(self.row_lengths, default=0)

    @property
    def batch_size(self) -> int:
        """Most rows (0: there are no caches)."""
        return min((cache.batch_size for cache in self.caches), default=0)

    @property
    def unbounded(self) -> bool:
        """Whether sequences may be longer than the model's context."""
        return all(cache.unbounded for cache in self.caches)

    @property
    def takes_rows_apart(self) -> bool:
        """Whether rows may have different lengths, join, leave and be reordered."""
        return all(cache.takes_rows_apart for cache in self.caches)

    @property
    def max_length(self) -> int | None:
        """Most tokens of a sequence in the caches that do not evict (None: all evict)."""
        return min((cache.cache_length for cache in self.caches if not cache.evicts), default=None)

    @property
    def max_tokens_forward(self) -> int | None:
        """Most tokens of a call with `input_pos > 0` (None: there are no caches)."""
        return min((cache.max_tokens_forward for cache in self.caches), default=None)

    @property
    def max_prefill_length(self) -> int | None:
        """Most tokens of a call with `input_pos=0` (None: any number)."""
        limits = [cache.max_prefill_length for cache in self.caches]
        return min((limit for limit in limits if limit is not None), default=None)

    def max_rewindable_tokens(self, max_seq_length: int) -> int:
        """Most tokens of the next call that can be rewound after it in every row, with that context."""
        room = [cache.max_rewindable_tokens for cache in self.caches]
        if not self.unbounded:
            room.append(max(0, max_seq_length - self.next_token_pos - 1))
        return min(room)

    def is_chunk_invariant(self, length: int) -> bool:
        """Whether the outputs for a sequence of that many tokens do not depend on how it is cut into calls."""
        return all(cache.is_chunk_invariant(length) for cache in self.caches)

    def uninterrupted_tokens(self, rows: Sequence[int] | None = None) -> int | None:
        """How many next tokens of `rows` (None: all) can come in one call without an eviction by score between them (None: any
        number)."""
        rows = range(len(self.row_lengths)) if rows is None else rows
        limits = {cache.uninterrupted_tokens(row) for cache in self.caches for row in rows}
        return min(limits - {None}, default=None)

    def size_in_bytes(self) -> int:
        """Bytes that the caches have allocated."""
        return sum(cache.size_estimate()[0] for cache in self.caches) // 8

    # -- one call

    def plan(
        self,
        input_pos: int,
        sizes: Sequence[int],
        rows: Sequence[int] | None,
        packed: bool,
        static: bool,
        max_seq_length: int,
    ) -> tuple[list[Plan | Unplanned], list[int]]:
        """Plan a call with `sizes[i]` new tokens for the i-th of `rows`, once for all caches with equal plans.

        Args:
            input_pos, rows, static: as for `KVCache.plan`.
            sizes: tokens of each of the call's rows.
            packed: the rows are concatenated into one.
            max_seq_length: the model's limit.

        Returns:
            A plan for every layer, and the number of earlier tokens of each of the call's rows.

        Raises:
            ValueError, IndexError: if there are no caches, or they or the model do not take the call.
        """
        if not self.caches:
            raise ValueError("there are no key-value caches: call set_kv_caches or assign_kv_caches first")
        self._recover()
        if not self._are_as_grouped():
            self._groups = group(self.caches, self._groups)
            self._grouped = changes.rows, list(self.caches)
        n_rows, T = (len(rows), list(sizes)) if packed else (len(sizes), sizes[0])
        plans: list[Plan | Unplanned] = [None] * len(self.caches)
        for together in self._groups:
            plan = together.caches[0].plan(input_pos, n_rows, T, rows, static)
            for layer in together.layers:
                plans[layer] = plan
        starts = list(plans[0].before if rows is None else [plans[0].before[row] for row in rows])
        if input_pos == 0 and max(sizes) > max_seq_length:  # a prefill attends to all of its tokens
            raise ValueError(
                f"a prefill of {max(sizes)} tokens is more than max_seq_length = {max_seq_length}: use chunks"
            )
        longest = max(start + size for start, size in zip(starts, sizes, strict=True))
        if longest > max_seq_length and not self.unbounded:
            raise ValueError(
                f"{longest} tokens are more than max_seq_length = {max_seq_length}: "
                "only caches that evict go on beyond the model's context"
            )
        return plans, starts

    def run(
        self,
        plans: Sequence[Plan | Unplanned],
        layers: Callable[[list[Plan | Unplanned]], torch.Tensor],
        sink_logits: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """Run `layers(plans)`, which executes the plans once they are prepared, and return its output. After a failure the
        caches are empty.

        Args:
            plans: as `plan` gives them.
            layers: all layers.
            sink_logits: of each layer, as for `KVCache.run`.
        """
        self._inconsistent = True
        try:
            output = layers(self._prepared(plans, sink_logits))
            if self._are_as_grouped():
                for together in self._groups:
                    together.commit(plans[together.layers[0]])
            else:
                for cache, plan in zip(self.caches, plans, strict=True):
                    cache.commit(plan)
        except BaseException:
            self.clear()
            raise
        self._inconsistent = False
        return output

    def _are_as_grouped(self) -> bool:
        """Whether the caches of each of `_groups` have equal plans as before, and share their numbers."""
        noted, caches = self._grouped
        return noted is changes.rows and caches == self.caches and self._groups[0].rows is not None

    def _prepared(
        self, plans: Sequence[Plan | Unplanned], sink_logits: Sequence[torch.Tensor | None]
    ) -> Sequence[Plan | Unplanned]:
        """What `KVCache.prepare` of each cache returns."""
        if self._are_as_grouped() and not any(plans[one.layers[0]].needs_preparing for one in self._groups):
            return plans
        return prepare_all(self.caches, plans, sink_logits)

    def memory(self) -> object:
        """Another object than before if a cache may be another one, or have other parts or buffers."""
        noted, caches, known = self._memory
        if noted is not changes.memory or caches != self.caches or any(one.rows is None for one in self._groups):
            known = object()
            self._memory = changes.memory, list(self.caches), known
        return known

    # -- rows, and going back

    def clear(self) -> None:
        """Remove all tokens."""
        self._inconsistent = True
        for cache in self.caches:
            cache.clear()
        self._inconsistent = False

    def start(self, batch_size: int) -> None:
        """Begin a batch of empty rows, each to be filled by calls with `rows`."""
        self.long_rope = False  # until the first prefill
        self._change(lambda cache: cache.start(batch_size))

    def extend(self, count: int) -> None:
        """Let `count` empty rows join the batch, each to be filled by calls with `rows`."""
        self._change(lambda cache: cache.extend(count))

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i of the batch becomes what row `rows[i]` was; rows may be dropped or repeated."""
        self._change(lambda cache: cache.reorder(rows))

    def rewind(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens."""
        self._change(lambda cache: cache.rewind(counts))

    def crop(self, n: int) -> bool:
        """Keep the first n tokens, if all caches can, otherwise none. Returns whether they could."""
        possible = 0 < n <= self.next_token_pos and all(n >= cache.crop_limit for cache in self.caches)
        if possible:
            self._change(lambda cache: cache.crop(n))
        else:
            self.clear()
        return possible

    def rewind_limit(self, row: int) -> int:
        """Least number of tokens, next to 0, that a row can go back to in all caches."""
        return max(cache.rewind_limit(row) for cache in self.caches)

    # -- one row

    def state_of_row(self, row: int) -> list[dict[str, Any]]:
        """The state of one row, a copy, by layer."""
        self._recover()
        return [cache.state_of_row(row) for cache in self.caches]

    def load_state_of_row(self, row: int, states: Sequence[Mapping[str, Any]], n: int) -> None:
        """Let an empty row have the first `n` tokens of a state that `state_of_row` gave.

        Raises:
            ValueError: if the state does not fit the caches, or cannot be rewound to `n`; all rows are empty then.
        """
        self._inconsistent = True
        try:
            for cache, state in zip(self.caches, states, strict=True):
                cache.load_state_of_row(row, state)
        except BaseException:
            self.clear()
            raise
        self._inconsistent = False
        lengths = self.row_lengths
        if lengths[row] > n:
            self.rewind([length - n if i == row else 0 for i, length in enumerate(lengths)])

    def _change(self, change: Callable[[KVCache], None]) -> None:
        self._recover()
        for i, cache in enumerate(self.caches):
            self._inconsistent = True
            try:
                change(cache)
            except ValueError:
                self._inconsistent = i > 0  # the cache that raised is unchanged
                raise
        self._inconsistent = False

    def _recover(self) -> None:
        """Clear the caches if a change of them was interrupted."""
        if self._inconsistent:
            self.clear()
