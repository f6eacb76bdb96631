"""A cache put together from a policy and a storage."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from litgpt.attention import DefaultKeysAndValues, KeysAndValues, MultiHeadSelfAttention
from litgpt.config import Config
from litgpt.kvcache.base import KVCache, KVCacheParams
from litgpt.kvcache.plan import Part, Plan, Step, plan_call
from litgpt.kvcache.policy import Policy
from litgpt.kvcache.storage import DefaultStorage, Storage


class DefaultKVCache(KVCache):
    """Attends over what a storage holds, and stores the tokens that a policy keeps.

    Rows are independent: each has its own length, and positions count from the first token of the row. In a ragged batch
    `next_token_pos` is the length of the longest row, and row b's new tokens stand at its own length.

    Args:
        config, batch_size, cache_length, block_idx, dtype, head_size: as for `KVCache`.
        policy: class of the policy.
        device: where the buffers are (default: CPU).
        storage: class of the storage.
        policy_args: further arguments of the policy.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        cache_length: int,
        block_idx: int,
        policy: type[Policy],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        head_size: int | None = None,
        storage: type[Storage] = DefaultStorage,
        **policy_args: Any,
    ) -> None:
        super().__init__(config, batch_size, cache_length, block_idx, dtype, head_size)
        self.policy = policy(cache_length, **policy_args)
        self.policy_args = policy_args
        self._policy_text = repr(self.policy)
        device = torch.device("cpu") if device is None else torch.device(device)
        self.storage = storage(
            KVCacheParams.from_config(config, batch_size, cache_length, device, self._dtype, self.head_size)
        )
        self.mha = MultiHeadSelfAttention(config)
        self.window = config.window(block_idx)
        self._lengths: tuple[int, ...] = ()  # tokens of each row in use
        self._oldest: tuple[int, ...] = ()  # by row: positions below it (and not among the sinks) are gone

    # -- what is in it

    @property
    def eff_batch_size(self) -> int | None:
        """Rows in use, set by the prefill (None: before it)."""
        return len(self._lengths) or None

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens so far of every row in use."""
        return self._lengths

    @property
    def next_token_pos(self) -> int:
        return max(self._lengths, default=0)

    @property
    def current_length(self) -> int:
        """N, slots in use (by the longest row)."""
        return min(self.next_token_pos, self.cache_length)

    @property
    def max_tokens_forward(self) -> int:
        return self.cache_length

    @property
    def max_prefill_length(self) -> int | None:
        return None if self.policy.evicts else self.cache_length

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype  # follows `model.to(dtype)`, as the device does

    @property
    def unbounded(self) -> bool:
        """Whether sequences may be longer than the model's context: all that is seen stays within its distances."""
        return self.policy.evicts and not self.policy.sinks and self.cache_length <= self.config.block_size

    def is_chunk_invariant(self, length: int) -> bool:
        within_window = self.window is not None and self.window <= self.policy.reach
        return not self.policy.evicts or within_window or super().is_chunk_invariant(length)

    def update_requires_attn_weights(self) -> bool:
        """Whether attention weights, summed over the new tokens, decide what stays; not by a policy of positions."""
        return False

    def get_keys_values(self) -> KeysAndValues | None:
        if not self.current_length:
            return None
        return self.storage.get(len(self._lengths), slice(0, self.current_length))

    def token_positions(self) -> torch.Tensor:
        lengths = torch.tensor(self._lengths, device=self.device, dtype=torch.int64)
        oldest = torch.tensor(self._oldest, device=self.device, dtype=torch.int64)[:, None]
        positions = self.policy.slot_positions(lengths)[:, : self.current_length]
        gone = (positions >= self.policy.sinks) & (positions < oldest)
        return positions.masked_fill(gone, -1)[:, None, :].expand(-1, self.n_query_groups, -1)

    def size_estimate(self) -> tuple[int, dict[str, int]]:
        parts = self.storage.size_in_bits()
        return sum(parts.values()), parts

    @classmethod
    def size_estimate_apriori(
        cls, params: KVCacheParams, storage: type[Storage] = DefaultStorage
    ) -> tuple[int, dict[str, int]]:
        parts = storage.size_in_bits_apriori(params)
        return sum(parts.values()), parts

    # -- one call

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor,
        input_pos: int,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `KVCache.forward`; `sinks` as for `run`."""
        self._check_dtype(query, key, value)
        self._check_shapes(query, key, value)
        plan = self.plan(input_pos, key.shape[0], key.shape[2])
        try:
            output = self.run(plan, query, key, value, token_idx, sinks)
        except BaseException:
            self.clear()  # slots may be half written: better empty than wrong
            raise
        self.commit(plan)
        return output

    def plan(
        self,
        input_pos: int,
        batch_size: int,
        T: int | Sequence[int],
        rows: Sequence[int] | None = None,
        static: bool = False,
    ) -> Plan:
        """Plan a call with T new tokens for each of `batch_size` rows (`rows` names them; None: the first ones). Several T,
        one for every row, are for a call of shape (1, sum(T)), which has the rows one after the other.

        `input_pos=0` empties the rows of the call first; without `rows` it starts a new batch, and all others are gone.

        Raises:
            ValueError: a wrong batch size, row or position.
            IndexError: more tokens than there are slots, where the policy does not evict.
        """
        lengths = self._check_call(input_pos, batch_size, T, rows)
        return plan_call(self.policy, self.window, lengths, rows, T, self.dtype, self.device, static)

    def plan_key(self) -> tuple:
        """Caches with equal keys have equal plans for the same call."""
        storage = self._modules["storage"]  # not `self.storage`, as in `commit`
        return self._policy_text, self.window, self._lengths, storage.dtype, storage.device

    def commit(self, plan: Plan) -> None:
        """Note that `plan` was run."""
        oldest = (self._oldest + (0,) * len(plan.after))[: len(plan.after)]
        if self.policy.evicts:
            oldest = tuple(
                max(old if before else 0, after - self.policy.reach)
                for old, before, after in zip(oldest, plan.before, plan.after, strict=True)
            )
        if oldest != self._oldest:
            self._oldest = oldest
        object.__setattr__(self, "_lengths", plan.after)  # that of modules takes time, in every layer of every step

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._check_dtype(query, key, value)
        if plan.parts[0].spans is not None:
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
            for part in plan.parts:
                own = [torch.stack([x[0, :, span] for span in part.spans]) for x in (query, key, value)]
                for span, of_row in zip(part.spans, self._run_part(part, *own, sinks), strict=True):
                    output[0, :, span] = of_row
        elif len(plan.parts) == 1:
            output = self._run_part(plan.parts[0], query, key, value, sinks)
        else:
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
            for part in plan.parts:
                r = part.chunk_rows
                output[r] = self._run_part(part, query[r], key[r], value[r], sinks)
        return output.transpose(1, 2).flatten(2)

    def _run_part(
        self, part: Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        outputs = []
        for step in part.steps:
            if step.write_first and step.write is not None:
                self._write(step, part.rows, key, value)
            kv = self._keys_values(step, part.rows, key, value)
            own = _take(query, step.queries)
            if step.consecutive is None:
                output, _ = self.mha.attend(own, kv, step.bias, False, sinks=sinks)
            else:
                output, _ = self.mha.attend_consecutive(own, kv, step.consecutive, sinks=sinks)
            outputs.append(output)
            if not step.write_first and step.write is not None:
                self._write(step, part.rows, key, value)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _write(self, step: Step, rows: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> None:
        self.storage.set(_take(key, step.write), _take(value, step.write), step.slots, rows)

    def _keys_values(
        self, step: Step, rows: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor
    ) -> KeysAndValues:
        if step.read is None and step.new is not None:
            return DefaultKeysAndValues(_take(key, step.new), _take(value, step.new))
        slots = slice(0, step.bias.shape[-1]) if step.read is None else step.read
        old = self.storage.get(key.shape[0], slots, rows)
        if step.new is None:
            return old
        return DefaultKeysAndValues(
            torch.cat((old.keys(), key[:, :, step.new]), dim=2), torch.cat((old.values(), value[:, :, step.new]), dim=2)
        )

    # -- errors

    def _check_call(
        self, input_pos: int, batch_size: int, T: int | Sequence[int], rows: Sequence[int] | None
    ) -> tuple[int, ...]:
        """Lengths of all rows as the call finds them."""
        sizes = [T] * batch_size if isinstance(T, int) else list(T)
        if len(sizes) != batch_size or min(sizes, default=0) < 1:
            raise ValueError(f"a call needs at least one token for each of {batch_size} rows, got {T}")
        if input_pos == 0 and rows is None:
            self._check_batch_size(batch_size)
            lengths = (0,) * batch_size
        else:
            lengths = self._lengths
            in_use = len(lengths)
            if rows is not None and not (
                1 <= batch_size == len(rows) == len(set(rows)) and all(0 <= row < in_use for row in rows)
            ):
                raise ValueError(
                    f"rows {list(rows)} do not name {batch_size} different ones of the {in_use} rows in use"
                )
            if rows is None and not in_use:
                raise ValueError(f"input_pos={input_pos}, but the next token's position is 0: the cache is empty")
            if rows is None and batch_size != in_use:
                raise ValueError(f"batch size {batch_size} differs from {in_use}, set by the prefill")
            named = range(in_use) if rows is None else rows
            if input_pos == 0:
                lengths = tuple(0 if row in named else length for row, length in enumerate(lengths))
            expected = max(lengths[row] for row in named)
            if input_pos != expected:
                raise ValueError(f"input_pos={input_pos}, but the next token's position is {expected}")
        chosen = range(len(lengths)) if rows is None else rows
        longest = max(lengths[row] + size for row, size in zip(chosen, sizes, strict=True))
        if not self.policy.evicts and longest > self.cache_length:
            raise IndexError(
                f"{longest} tokens do not fit into a dense cache of cache_length={self.cache_length}: "
                "enlarge it, or use a cache that evicts"
            )
        return lengths

    def _check_batch_size(self, batch_size: int) -> None:
        if not 1 <= batch_size <= self.batch_size:
            raise ValueError(f"batch size {batch_size} must be in 1..{self.batch_size}, the cache's batch_size")

    def _check_shapes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        B, _, T, _ = key.shape
        for name, x, heads in (("query", query, self.n_head), ("key", key, self.n_query_groups)):
            if tuple(x.shape) != (B, heads, T, self.head_size):
                raise ValueError(f"{name} must be {(B, heads, T, self.head_size)}, got {tuple(x.shape)}")
        expected = (*key.shape[:-1], self.value_size or self.head_size)
        if tuple(value.shape) != expected:
            raise ValueError(f"value must be {expected}, got {tuple(value.shape)}")

    def _check_dtype(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        dtype = self.dtype
        if query.dtype != dtype or key.dtype != dtype or value.dtype != dtype:
            raise ValueError(
                f"query, key and value must be {dtype}, the cache's dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
            )

    # -- state between calls

    def clear(self) -> None:
        """Forget everything; the next call has to be a prefill."""
        self._lengths, self._oldest = (), ()

    def start(self, batch_size: int) -> None:
        """Begin a batch of empty rows, each to be filled by a call with `rows`."""
        self._check_batch_size(batch_size)
        self._lengths, self._oldest = (0,) * batch_size, (0,) * batch_size

    def extend(self, count: int) -> None:
        """Let `count` empty rows join the batch, each to be filled by a call with `rows`."""
        self._check_batch_size(len(self._lengths) + count)
        self._lengths, self._oldest = self._lengths + (0,) * count, self._oldest + (0,) * count

    @property
    def crop_limit(self) -> int:
        """Least n that `crop` accepts, next to 0."""
        end = self.next_token_pos
        limits = (self._rewind_limit(row) + end - length for row, length in enumerate(self._lengths))
        return max(limits, default=0)

    def _rewind_limit(self, row: int) -> int:
        """Least length, next to 0, that a row can go back to."""
        # what is gone is gone by the longest that the row ever was, also after a crop
        longest = max(self._lengths[row], self._oldest[row] + self.policy.reach)
        return self.policy.crop_limit(longest, self.window)

    @property
    def max_tokens_tentative(self) -> int:
        seen = self.policy.reach if self.window is None else min(self.window, self.policy.reach)
        late = self.policy.reach - seen + 2 if self.policy.evicts else 0  # once tokens are evicted
        room = self.cache_length - self.next_token_pos
        return min(self.cache_length, late if any(old > self.policy.sinks for old in self._oldest) else max(room, late))

    def rewind(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens.

        Raises:
            ValueError: if there are not as many, or what a later token would see was evicted.
        """
        if len(counts) != len(self._lengths):
            raise ValueError(f"{len(counts)} counts for {len(self._lengths)} rows in use")
        lengths = tuple(length - count for length, count in zip(self._lengths, counts, strict=True))
        for row, length in enumerate(lengths):
            limit = self._rewind_limit(row)
            if not 0 <= length <= self._lengths[row] or 0 < length < limit:
                raise ValueError(
                    f"cannot rewind row {row} from {self._lengths[row]} to {length} tokens: it can go back to {limit} or "
                    "more, or to 0"
                )
        self._lengths = lengths
        self._oldest = tuple(old if length else 0 for old, length in zip(self._oldest, lengths, strict=True))

    def crop(self, n: int) -> None:
        """Go back to when `next_token_pos` was n: the last tokens of every row are forgotten.

        Raises:
            ValueError: if n is not in 0..next_token_pos, or what a later token would see was evicted (`crop_limit`).
        """
        end = self.next_token_pos
        if not 0 <= n <= end:
            raise ValueError(f"cannot crop to {n}: must be in 0..{end}, the tokens so far")
        if 0 < n < self.crop_limit:
            raise ValueError(
                f"cannot crop to {n} of {end} tokens: some row would miss tokens that were evicted, or be shorter than "
                f"empty; crop to {self.crop_limit} or more, or start anew with input_pos=0"
            )
        if n == 0:
            self.clear()
        self.rewind([end - n] * len(self._lengths))

    def reorder(self, rows: Iterable[int]) -> None:
        """Row i becomes what row `rows[i]` was. Rows may be dropped or repeated, as long as `batch_size` holds them.

        Raises:
            ValueError: if a row is not in use, or there are none or too many.
        """
        rows = [int(row) for row in rows]
        if not 1 <= len(rows) <= self.batch_size or not all(0 <= row < len(self._lengths) for row in rows):
            raise ValueError(
                f"rows {rows}: need 1..{self.batch_size} of the {len(self._lengths)} rows in use (0-based)"
            )
        self.storage.select_rows(rows)
        self._lengths = tuple(self._lengths[row] for row in rows)
        self._oldest = tuple(self._oldest[row] for row in rows)

    def fork(self) -> "DefaultKVCache":
        """An independent copy: what is done to one does not show in the other."""
        twin = self.twin()
        twin.load_state(self.state(copy=False))
        return twin

    def twin(self) -> "DefaultKVCache":
        """An empty cache of the same kind and size."""
        twin = object.__new__(type(self))
        DefaultKVCache.__init__(
            twin,
            self.config,
            self.batch_size,
            self.cache_length,
            self.block_idx,
            type(self.policy),
            self.device,
            self.dtype,
            self.head_size,
            type(self.storage),
            **self.policy_args,
        )
        return twin

    def state(self, copy: bool = True) -> dict[str, Any]:
        """What a later `load_state` needs to go on from here: the used parts of the buffers, and lengths.

        Without `copy`, tensors are views of the buffers, good until the next call.
        """
        state: dict[str, Any] = {
            "policy": repr(self.policy),
            "lengths": list(self._lengths),
            "oldest": list(self._oldest),
        }
        if self.current_length:
            stored = self.storage.state(len(self._lengths), self.current_length)
            state |= {name: x.clone() if copy else x for name, x in stored.items()}
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises:
            ValueError: if it was taken from a cache of another shape or dtype, or tokens were evicted by another policy.
        """
        lengths = tuple(int(length) for length in state["lengths"])
        used = min(max(lengths, default=0), self.cache_length)
        if len(lengths) > self.batch_size:
            raise ValueError(f"the state has {len(lengths)} rows, the cache batch_size={self.batch_size}")
        if any(state["oldest"]) and state["policy"] != repr(self.policy):
            raise ValueError(
                f"the state is what {state['policy']} left of longer sequences, the cache has {self.policy!r}"
            )
        if used:
            self.storage.load_state(state, len(lengths), used)
        self._lengths = lengths
        self._oldest = tuple(int(position) for position in state["oldest"])


def _take(x: torch.Tensor, tokens: slice | torch.Tensor) -> torch.Tensor:
    """Some tokens of a chunk (B, heads, T, D); x itself where they are all."""
    if isinstance(tokens, slice) and tokens.start == 0 and tokens.stop == x.shape[2]:
        return x
    return x[:, :, tokens]
