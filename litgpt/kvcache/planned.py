"""A cache put together from a policy and a storage, whose calls are planned from numbers that the host knows."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from litgpt.config import Config
from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues, join
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.plan import Part, Plan, Step
from litgpt.kvcache.policies import Policy
from litgpt.kvcache.storages import Storage
from litgpt.kvcache.storages.base import check_state
from litgpt.kvcache.storages.default import DefaultStorage


class RowState:
    """What changes with every call: for each of a cache's `ROW_FIELDS` one integer a row in use. The first ones are lengths."""

    def __init__(self, *fields: tuple[int, ...]) -> None:
        self.fields = fields

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens so far of every row."""
        return self.fields[0]


class PlannedKVCache(DefaultKVCache):
    """Attends over what a storage holds, step by step as planned.

    Rows are independent: each has its own length, and positions count from the first token of the row. In a ragged batch
    `next_token_pos` is the length of the longest row, and row b's new tokens stand at its own length.

    Args:
        config, batch_size, block_idx, dtype, head_size: as for `KVCache`.
        policy: which tokens stay, and how many.
        device: where the buffers are (default: CPU).
        storage: class of the storage.
        storage_args: its own arguments.
        mha_kwargs: as for `DefaultKVCache`.
    """

    ROW_FIELDS: ClassVar[tuple[str, ...]] = ("lengths",)
    STORAGE: ClassVar[type[Storage]] = DefaultStorage  # with the next one in the class for such a cache, see `made_of`
    STORAGE_ARGS: ClassVar[Mapping[str, Any]] = {}
    memory_version = 0  # of the buffers, in caches that may get others
    # in caches whose heads have numbers of slots of their own: the first slot of each, and how many it has more than plans say
    head_slots: torch.Tensor | None = None

    def __init__(
        self,
        config: Config,
        batch_size: int,
        policy: Policy,
        block_idx: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        head_size: int | None = None,
        storage: type[Storage] = DefaultStorage,
        storage_args: Mapping[str, Any] | None = None,
        **mha_kwargs: Any,
    ) -> None:
        super().__init__(config, batch_size, policy.cache_length, block_idx, dtype, head_size, **mha_kwargs)
        self.policy = policy
        self._policy_key = policy.key  # compiled code cannot enter the lock of a cached property
        device = torch.device("cpu") if device is None else torch.device(device)
        params = KVCacheParams.from_config(config, batch_size, policy.cache_length, device, self._dtype, self.head_size)
        self._storage_args = dict(storage_args or {})
        self.storage = storage(params, **self._storage_args)
        self.watch: Callable[[torch.Tensor, torch.Tensor | None], None] | None = (
            None  # told the queries and sinks of every call
        )
        self._rows = self._empty_rows()
        self._place = self.storage.dtype, self.storage.device

    @classmethod
    def made_of(
        cls, policy: Policy, storage: type[Storage], storage_args: Mapping[str, Any] | None = None
    ) -> "type[PlannedKVCache]":
        """The class of caches of these parts, which knows their size beforehand."""
        storage_args = dict(storage_args or {})
        if (storage, storage_args) == (cls.STORAGE, cls.STORAGE_ARGS):
            return cls
        return cls._derived(cls.__name__, STORAGE=storage, STORAGE_ARGS=storage_args)

    @classmethod
    def _derived(cls, name: str, key: object = None, **attributes: Any) -> "type[PlannedKVCache]":
        key = cls, key, *(tuple(sorted(x.items())) if isinstance(x, dict) else x for x in attributes.values())
        if key not in _CLASSES:
            _CLASSES[key] = type(name, (cls,), {**attributes, "__doc__": cls.__doc__, "__module__": cls.__module__})
        return _CLASSES[key]

    def __reduce_ex__(self, protocol: int) -> tuple:
        """As of every object; a class that `made_of` made is no module's, and made again where it is read."""
        reduced, kind = super().__reduce_ex__(protocol), type(self)
        if kind not in _CLASSES.values():
            return reduced
        parts = kind.__base__, self.policy, kind.STORAGE, kind.STORAGE_ARGS
        return _new, parts, *reduced[2:]

    @classmethod
    def from_policy(
        cls,
        config: Config,
        params: KVCacheParams,
        policy: Policy,
        block_idx: int,
        storage: type[Storage] = DefaultStorage,
        **kwargs: Any,
    ) -> "PlannedKVCache":
        """The cache of a policy and a storage, with everything else as `params` say."""
        place = params.device, params.dtype, params.head_size
        return cls(config, params.batch_size, policy, block_idx, *place, storage, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> "PlannedKVCache":
        """What `to` and the like call."""
        super()._apply(*args, **kwargs)
        self._place = self.storage.dtype, self.storage.device
        return self

    # -- what is in it

    @property
    def eff_batch_size(self) -> int | None:
        """Rows in use, set by the prefill (None: before it)."""
        return len(self._rows.lengths) or None

    @property
    @abstractmethod
    def current_length(self) -> int:
        """N, slots in use (by the longest row)."""

    @property
    def evicts(self) -> bool:
        return self.policy.evicts

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens so far of every row in use."""
        return self._rows.lengths

    @property
    def next_token_pos(self) -> int:
        return max(self._rows.lengths, default=0)

    @property
    def takes_rows_apart(self) -> bool:
        return True

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

    def get_keys_values(self) -> KeysAndValues | None:
        if not self.current_length:
            return None
        return self.storage.get(len(self._rows.lengths), slice(0, self.current_length))

    def size_estimate(self) -> tuple[int, dict[str, int]]:
        parts = self.storage.size_in_bits()
        return sum(parts.values()), parts

    @classmethod
    def size_estimate_apriori(
        cls, params: KVCacheParams, storage: type[Storage] | None = None, **storage_args: Any
    ) -> tuple[int, dict[str, int]]:
        """As `KVCache.size_estimate_apriori`, for another `storage` and its arguments than those of the class."""
        if storage is None:
            storage, storage_args = cls.STORAGE, {**cls.STORAGE_ARGS, **storage_args}
        parts = storage.size_in_bits_apriori(params, **storage_args)
        return sum(parts.values()), parts

    def kept_queries(self) -> torch.Tensor | None:
        """Queries that the policy asks for (batch_size, H, slots, D), to be written as steps say; None: it asks for none."""
        return None

    # -- one call

    @abstractmethod
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

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor,
        input_pos: int,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `KVCache.forward`; `sink_logits` as for `run`."""
        self._check_dtype(query, key, value)
        self._check_shapes(query, key, value)
        plan = self.plan(input_pos, key.shape[0], key.shape[2])
        try:
            output = self.run(plan, query, key, value, token_idx, sink_logits)
        except BaseException:
            self.clear()  # slots may be half written: better empty than wrong
            raise
        self.commit(plan)
        return output

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = self.prepare(plan, sink_logits)
        if query.dtype != self._place[0] or key.dtype != query.dtype or value.dtype != query.dtype:
            return self._run_in_own_dtype(plan, query, key, value, token_idx, sink_logits)
        new = NewTokens(query, key, value, sink_logits, self._is_recorded(plan, query, key, value, sink_logits))
        if len(plan.parts) == 1 and plan.parts[0].spans is None:
            output = self._run_part(plan.parts[0], new)
        else:
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
            for part in plan.parts:
                if part.spans is None:
                    output[part.chunk_rows] = self._run_part(part, new.of_rows(part.chunk_rows))
                    continue
                for span, of_row in zip(part.spans, self._run_part(part, new.of_spans(part.spans)), strict=True):
                    output[0, :, span] = of_row
        if self.watch is not None:
            self.watch(query, sink_logits)
        return output.transpose(1, 2).flatten(2)

    def _run_in_own_dtype(self, plan: Plan, *tensors: torch.Tensor | None) -> torch.Tensor:
        """`run` under autocast: in the cache's dtype, with a result in that of the queries. `tensors` as for `run`."""
        inputs, others = tensors[:3], tensors[3:]
        self._check_dtype(*inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return self.run(plan, *(x.to(self.dtype) for x in inputs), *others).to(inputs[0].dtype)

    def _is_recorded(self, plan: Plan, *inputs: torch.Tensor | None) -> bool:
        """Whether autograd records what is done with these inputs. A first call forgets what it recorded of earlier sequences."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if not any(plan.before):
            self.storage.detach_graph()
        return any(x is not None and x.requires_grad for x in (*inputs, *self.storage.buffers()))

    def _run_part(self, part: Part, new: NewTokens) -> torch.Tensor:
        outputs = [self._run_step(step, part.rows, new) for step in part.steps]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _run_step(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> torch.Tensor:
        """Output (B, H, T, D) of one step in `rows` of the cache (None: the first ones)."""
        if step.write_first and step.write is not None:
            self._write(step, rows, new)
        output = self._attend(step, rows, new)
        if not step.write_first and step.write is not None:
            self._write(step, rows, new)
        return output

    def _write(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> None:
        if new.recording:
            self.storage.detach_writes()
        self.storage.set(_take(new.key, step.write), _take(new.value, step.write), step.slots, rows)

    def _attend(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> torch.Tensor:
        kv, query = self._keys_values(step, rows, new), _take(new.query, step.queries)
        if step.consecutive is not None:
            return self.mha.attend_consecutive(query, kv, step.consecutive, sink_logits=new.sink_logits)[0]
        bias = step.bias if step.mask is None else step.mask.bias
        return self.mha.attend(query, kv, bias, False, sink_logits=new.sink_logits)[0]

    def _keys_values(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> KeysAndValues:
        if step.new is not None:
            own = self.storage.as_stored(_take(new.key, step.new), _take(new.value, step.new))
            if step.read is None:
                return DefaultKeysAndValues(own.keys(), own.values())
        slots = slice(0, step.bias.shape[-1]) if step.read is None else step.read
        old = self.storage.get(new.key.shape[0], slots, rows)
        return old if step.new is None else join(old, own)

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
            lengths = self._rows.lengths
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

    def _check_dtype(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        dtype, device = self._place[0], query.device.type
        if query.dtype == key.dtype == value.dtype == dtype or (device != "meta" and torch.is_autocast_enabled(device)):
            return
        raise ValueError(
            f"query, key and value must be {dtype}, the cache's dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )

    # -- state between calls

    @property
    def row_fields(self) -> tuple[tuple[int, ...], ...]:
        """The numbers that describe the rows in use, as `refill` takes them."""
        return self._rows.fields

    def refill(self, row_fields: tuple[tuple[int, ...], ...], key: torch.Tensor, value: torch.Tensor) -> None:
        """Hold keys and values (B, G, n, D), which may require gradients, in the first n slots, for rows of these fields."""
        self._rows = RowState(*row_fields)
        self.storage.detach_graph()
        self.storage.detach_writes()
        if key.shape[2]:
            key, value = key.to(self.dtype), value.to(self.dtype)  # under autocast they are in its precision
            self.storage.set(key, value, torch.arange(key.shape[2], device=key.device), None)

    def _empty_rows(self, count: int = 0) -> RowState:
        return RowState(*[(0,) * count] * len(self.ROW_FIELDS))

    def clear(self) -> None:
        self._rows = self._empty_rows()

    def start(self, batch_size: int) -> None:
        self._check_batch_size(batch_size)
        self._rows = self._empty_rows(batch_size)

    def extend(self, count: int) -> None:
        self._check_batch_size(len(self._rows.lengths) + count)
        self._rows = RowState(*(field + (0,) * count for field in self._rows.fields))

    @abstractmethod
    def rewind_limit(self, row: int) -> int:
        """Least length, next to 0, that a row can go back to."""

    @abstractmethod
    def _shortened(self, lengths: tuple[int, ...]) -> RowState:
        """The state of rows that go back to these lengths, none of them empty."""

    @property
    def crop_limit(self) -> int:
        end = self.next_token_pos
        limits = (self.rewind_limit(row) + end - length for row, length in enumerate(self._rows.lengths))
        return max(limits, default=0)

    def rewind(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens.

        Raises:
            ValueError: if there are not as many, or what a later token would see was evicted.
        """
        if len(counts) != len(self._rows.lengths):
            raise ValueError(f"{len(counts)} counts for {len(self._rows.lengths)} rows in use")
        lengths = tuple(length - count for length, count in zip(self._rows.lengths, counts, strict=True))
        for row, length in enumerate(lengths):
            limit = self.rewind_limit(row)
            if not 0 <= length <= self._rows.lengths[row] or 0 < length < limit:
                raise ValueError(
                    f"cannot rewind row {row} from {self._rows.lengths[row]} to {length} tokens: it can go back to {limit} or "
                    "more, or to 0"
                )
        fields = self._shortened(lengths).fields
        emptied = [tuple(x if length else 0 for x, length in zip(field, lengths, strict=True)) for field in fields]
        self._rows = RowState(*emptied)

    def crop(self, n: int, row: int | None = None) -> None:
        """Go back to when `next_token_pos` was n: the last tokens of every row are forgotten. With `row`, only that one goes back, to
        n tokens of its own.

        Raises:
            ValueError: if n is not in 0..next_token_pos, or what a later token would see was evicted (`crop_limit`).
        """
        if row is not None:
            if not 0 <= row < len(self._rows.lengths):
                raise ValueError(f"row {row} is not in use: there are {len(self._rows.lengths)}")
            return self.rewind([length - n if b == row else 0 for b, length in enumerate(self._rows.lengths)])
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
        self.rewind([end - n] * len(self._rows.lengths))

    def reorder(self, rows: Iterable[int]) -> None:
        """Row i becomes what row `rows[i]` was. Rows may be dropped or repeated, as long as `batch_size` holds them.

        Raises:
            ValueError: if a row is not in use, or there are none or too many.
        """
        rows = [int(row) for row in rows]
        if not 1 <= len(rows) <= self.batch_size or not all(0 <= row < len(self._rows.lengths) for row in rows):
            raise ValueError(
                f"rows {rows}: need 1..{self.batch_size} of the {len(self._rows.lengths)} rows in use (0-based)"
            )
        self.storage.select_rows(rows)
        self._rows = RowState(*(tuple(field[row] for row in rows) for field in self._rows.fields))

    def fork(self) -> "PlannedKVCache":
        other = self.empty_copy()
        other.load_state(self.state(copy=False))
        return other

    def empty_copy(self) -> "PlannedKVCache":
        kept = {id(x): x for x in (self.config, self.policy, self.mha)}
        with torch.inference_mode(False):
            other = copy.deepcopy(self, {**kept, id(self.storage): self.storage.empty_copy()})
        other.clear()
        return other

    def state(self, row: int | None = None, copy: bool = True) -> dict[str, Any]:
        if row is not None:
            return self.state_of_row(row, copy)
        state: dict[str, Any] = {"policy": repr(self.policy)}
        state |= {name: list(field) for name, field in zip(self.ROW_FIELDS, self._rows.fields, strict=True)}
        if self.current_length:
            stored = self._stored(len(self._rows.lengths), self.current_length)
            state |= {name: x.clone() if copy else x for name, x in stored.items()}
        return state

    def _stored(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        """What the first `used` slots of the first `batch` rows hold: views of the buffers."""
        return self.storage.state(batch, used)

    def state_of_row(self, row: int, copy: bool = True) -> dict[str, Any]:
        state: dict[str, Any] = {"policy": repr(self.policy)}
        state |= {name: [field[row]] for name, field in zip(self.ROW_FIELDS, self._rows.fields, strict=True)}
        if used := self._slots_in_use(row):
            stored = {name: x[row : row + 1] for name, x in self._stored(row + 1, used).items()}
            state |= {name: x.clone() if copy else x for name, x in stored.items()}
        return state

    def load_state_of_row(self, row: int, state: Mapping[str, Any]) -> None:
        numbers = [int(state[name][0]) for name in self.ROW_FIELDS]
        fields = zip(self._rows.fields, numbers, strict=True)
        before, self._rows = self._rows, RowState(*(of[:row] + (new,) + of[row + 1 :] for of, new in fields))
        try:
            if used := self._slots_in_use(row):
                targets = {name: x[row : row + 1] for name, x in self._stored(row + 1, used).items()}
                check_state(state, targets)
                for name, target in targets.items():
                    target.copy_(state[name])
        except ValueError:
            self._rows = before
            raise

    def _slots_in_use(self, row: int) -> int:
        """Slots that a row has filled."""
        return min(self._rows.lengths[row], self.cache_length)

    def load_state(self, state: Mapping[str, Any], row: int | None = None) -> None:
        """Go on from where `state` was taken, with all rows, or with one: see `load_state_of_row`.

        Raises:
            ValueError: if it was taken from a cache of another shape or dtype, or tokens were evicted by another policy.
        """
        if row is not None:
            return self.load_state_of_row(row, state)
        rows = RowState(*(tuple(int(number) for number in state.get(name, ())) for name in self.ROW_FIELDS))
        if len(rows.lengths) > self.batch_size:
            raise ValueError(f"the state has {len(rows.lengths)} rows, the cache batch_size={self.batch_size}")
        complete = len({len(field) for field in rows.fields}) == 1
        if not complete or (state["policy"] != repr(self.policy) and not self._takes_over(rows)):
            raise ValueError(
                f"the state is what {state['policy']} left of longer sequences, the cache has {self.policy!r}"
            )
        before, self._rows = self._rows, rows
        try:
            if self.current_length:
                self._load_stored(state, len(rows.lengths), self.current_length)
        except ValueError:
            self._rows = before
            raise

    @abstractmethod
    def _takes_over(self, rows: RowState) -> bool:
        """Whether the policy can go on with rows that another one left."""

    def _load_stored(self, state: Mapping[str, Any], batch: int, used: int) -> None:
        self.storage.load_state(state, batch, used)


def _take(x: torch.Tensor, tokens: slice | torch.Tensor) -> torch.Tensor:
    """Some tokens of a chunk (B, heads, T, D); x itself where they are all."""
    if isinstance(tokens, slice) and tokens.start == 0 and tokens.stop == x.shape[2]:
        return x
    return x[:, :, tokens]


def _new(
    kind: type[PlannedKVCache], policy: Policy, storage: type[Storage], storage_args: Mapping[str, Any]
) -> PlannedKVCache:
    """A cache of these parts without its state, for `pickle`."""
    made = kind.made_of(policy, storage, storage_args)
    return made.__new__(made)


_CLASSES: dict[tuple, type[PlannedKVCache]] = {}
