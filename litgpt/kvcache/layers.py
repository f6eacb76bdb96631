"""The caches of all layers of a model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from litgpt.config import Config
from litgpt.kvcache.base import KVCache
from litgpt.kvcache.plan import Plan, Unplanned, read_bucket
from litgpt.kvcache.spec import CacheSpec, HasCaches


@dataclass(eq=False)
class LayerCaches:
    """Caches of all layers (or none), and what is known of the sequences in them.

    A model uses one such object at a time, and takes another in a single assignment; its layers get their caches by `attach`,
    which may be repeated. What changes all caches changes all of them, or is an error that changes none; if it is interrupted
    on its way, they are empty afterwards.

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
    _attached: bool = field(default=False, init=False)
    _torn: bool = field(default=False, init=False)  # a change of all caches has begun, and has not ended

    @staticmethod
    def assigned(caches: Iterable[KVCache], config: Config) -> "LayerCaches":
        """Caches that someone else has made.

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
        """Default caches for `length` tokens in the place of these, of which those that fit are used on, empty.

        `static` makes them for compiled code, which tells a whole buffer from a part of one: with a slot never read.
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

    def attach(self, attentions: Iterable[nn.Module]) -> None:
        """Give every layer's attention its cache, unless that was done."""
        if not self._attached:
            attentions = list(attentions)
            for attention, cache in zip(attentions, self.caches or [None] * len(attentions), strict=True):
                attention.kv_cache = cache
            self._attached = True

    def detach(self) -> None:
        """Note that the layers may get other caches."""
        self._attached = False

    # -- what is in them, and how much can be

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens so far of every row in use."""
        self._mend()
        return self.caches[0].row_lengths if self.caches else ()

    @property
    def next_token_pos(self) -> int:
        """The `input_pos` of the next token, the same in all caches (0: they are empty, or there are none)."""
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
        """Whether rows may have lengths of their own, come, go and change places."""
        return all(cache.takes_rows_apart for cache in self.caches)

    @property
    def max_length(self) -> int | None:
        """Most tokens of a sequence, by those caches that do not evict (None: all do)."""
        return min((cache.cache_length for cache in self.caches if not cache.evicts), default=None)

    @property
    def max_tokens_forward(self) -> int | None:
        """Most tokens that a call with `input_pos > 0` should bring (None: there are no caches)."""
        return min((cache.max_tokens_forward for cache in self.caches), default=None)

    @property
    def max_prefill_length(self) -> int | None:
        """Most tokens that a call with `input_pos=0` may bring (None: any number)."""
        limits = [cache.max_prefill_length for cache in self.caches]
        return min((limit for limit in limits if limit is not None), default=None)

    def max_rewindable_tokens(self, max_seq_length: int) -> int:
        """Most tokens at the end of the next call that can be rewound after it, in every row of a model of that context."""
        room = [cache.max_rewindable_tokens for cache in self.caches]
        if not self.unbounded:
            room.append(max(0, max_seq_length - self.next_token_pos - 1))
        return min(room)

    def is_chunk_invariant(self, length: int) -> bool:
        """Whether the outputs for a sequence of that many tokens do not depend on how it is cut into calls."""
        return all(cache.is_chunk_invariant(length) for cache in self.caches)

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
        """Plan a call that brings `sizes[i]` new tokens to the i-th of `rows`, once for all caches with equal plans.

        Args:
            input_pos, rows, static: as for `KVCache.plan`.
            sizes: of the call's rows.
            packed: the rows lie one after the other in the call.
            max_seq_length: the model's limit.

        Returns:
            A plan for every layer, and how many tokens each of the call's rows has before it.

        Raises:
            ValueError, IndexError: if there are no caches, or they or the model do not take the call.
        """
        if not self.caches:
            raise ValueError("there are no key-value caches: call set_kv_caches or assign_kv_caches first")
        self._mend()
        plans, different = [], []
        for cache in self.caches:
            key = cache.plan_key()
            plan = next((plan for known, plan in different if known == key), None)
            if plan is None:
                n_rows, T = (len(rows), list(sizes)) if packed else (len(sizes), sizes[0])
                plan = cache.plan(input_pos, n_rows, T, rows, static)
                different.append((key, plan))
            plans.append(plan)
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

    def run(self, plans: Sequence[Plan | Unplanned], layers: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `layers` gives, which are to run the plans. If they fail, the caches are empty: better than half written."""
        self._torn = True
        try:
            output = layers()
            for cache, plan in zip(self.caches, plans, strict=True):
                cache.commit(plan)
        except BaseException:
            self.clear()
            raise
        self._torn = False
        return output

    # -- rows, and going back

    def clear(self) -> None:
        """Forget everything."""
        self._torn = True
        for cache in self.caches:
            cache.clear()
        self._torn = False

    def start(self, batch_size: int) -> None:
        """Begin a batch of empty rows, each to be filled by calls with `rows`."""
        self.long_rope = False  # until a prefill says how long the sequences are
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
        """Go back to when `next_token_pos` was n, if all caches can; else forget everything. Returns whether they could."""
        possible = 0 < n <= self.next_token_pos and all(n >= cache.crop_limit for cache in self.caches)
        if possible:
            self._change(lambda cache: cache.crop(n))
        else:
            self.clear()
        return possible

    def _change(self, change: Callable[[KVCache], None]) -> None:
        self._mend()
        for i, cache in enumerate(self.caches):
            self._torn = True
            try:
                change(cache)
            except ValueError:
                self._torn = i > 0  # the cache that refuses is as it was
                raise
        self._torn = False

    def _mend(self) -> None:
        """Empty all caches if a change of all was interrupted."""
        if self._torn:
            self.clear()
