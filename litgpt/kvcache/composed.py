"""A cache put together from a policy and a storage."""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from litgpt.config import Config
from litgpt.keys_and_values import KeysAndValues
from litgpt.kvcache.changes import NotesChanges
from litgpt.kvcache.default import DefaultKVCache
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.policies import Policy
from litgpt.kvcache.row_state import RowState
from litgpt.kvcache.storages import Storage
from litgpt.kvcache.storages.base import check_state
from litgpt.kvcache.storages.default import DefaultStorage


class ComposedKVCache(NotesChanges, DefaultKVCache):
    """What a cache of a policy and a storage is between calls.

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
        self._rows = self._empty_rows()
        self._place = self.storage.dtype, self.storage.device

    @classmethod
    def made_of(
        cls, policy: Policy, storage: type[Storage], storage_args: Mapping[str, Any] | None = None
    ) -> "type[ComposedKVCache]":
        """The class of caches of these parts, which knows their size beforehand."""
        storage_args = dict(storage_args or {})
        if (storage, storage_args) == (cls.STORAGE, cls.STORAGE_ARGS):
            return cls
        return cls._derived(cls.__name__, STORAGE=storage, STORAGE_ARGS=storage_args)

    @classmethod
    def _derived(cls, name: str, key: object = None, **attributes: Any) -> "type[ComposedKVCache]":
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
    ) -> "ComposedKVCache":
        """The cache of a policy and a storage, with everything else as `params` say."""
        place = params.device, params.dtype, params.head_size
        return cls(config, params.batch_size, policy, block_idx, *place, storage, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> "ComposedKVCache":
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

    # -- rows, and going back

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
        self._rows = self._rows.of(rows)

    # -- copies

    def fork(self) -> "ComposedKVCache":
        other = self.empty_copy()
        other.load_state(self.state(copy=False))
        return other

    def empty_copy(self) -> "ComposedKVCache":
        kept = {id(x): x for x in (self.config, self.policy, self.mha)}
        with torch.inference_mode(False):
            other = copy.deepcopy(self, {**kept, id(self.storage): self.storage.empty_copy()})
        other.clear()
        return other

    def state(self, row: int | None = None, copy: bool = True) -> dict[str, Any]:
        batch = len(self._rows.lengths)
        rows, used = slice(0, batch), self.current_length
        if row is not None:
            rows, used = slice(row, row + 1), self._slots_in_use(row)
        state: dict[str, Any] = {"policy": repr(self.policy)}
        state |= {name: list(field[rows]) for name, field in zip(self.ROW_FIELDS, self._rows.fields, strict=True)}
        stored = self._stored(rows.stop, used) if used else {}
        return state | {name: x[rows].clone() if copy else x[rows] for name, x in stored.items()}

    def state_of_row(self, row: int, copy: bool = True) -> dict[str, Any]:
        return self.state(row, copy)

    def _stored(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        """What the first `used` slots of the first `batch` rows hold: views of the buffers."""
        return self.storage.state(batch, used)

    def _slots_in_use(self, row: int) -> int:
        """Slots that a row has filled."""
        return min(self._rows.lengths[row], self.cache_length)

    def load_state(self, state: Mapping[str, Any], row: int | None = None) -> None:
        """Go on from where `state` was taken, with all rows, or with one: see `load_state_of_row`.

        Raises:
            ValueError: if it was taken from a cache of another shape or dtype, or tokens were evicted by another policy.
        """
        if row is None:
            rows = self._rows_of(state)
        else:
            rows = self._rows.with_row(row, [int(state[name][0]) for name in self.ROW_FIELDS])
        before, self._rows = self._rows, rows
        try:
            if row is None and self.current_length:
                self._load_stored(state, len(rows.lengths), self.current_length)
            elif row is not None and (used := self._slots_in_use(row)):
                targets = {name: x[row : row + 1] for name, x in self._stored(row + 1, used).items()}
                check_state(state, targets)
                for name, target in targets.items():
                    target.copy_(state[name])
        except ValueError:
            self._rows = before
            raise

    def load_state_of_row(self, row: int, state: Mapping[str, Any]) -> None:
        self.load_state(state, row)

    def _rows_of(self, state: Mapping[str, Any]) -> RowState:
        """The rows that a state is of, if this cache can go on with them."""
        rows = RowState(*(tuple(int(number) for number in state.get(name, ())) for name in self.ROW_FIELDS))
        if len(rows.lengths) > self.batch_size:
            raise ValueError(f"the state has {len(rows.lengths)} rows, the cache batch_size={self.batch_size}")
        complete = len({len(field) for field in rows.fields}) == 1
        if not complete or (state["policy"] != repr(self.policy) and not self._takes_over(rows)):
            raise ValueError(
                f"the state is what {state['policy']} left of longer sequences, the cache has {self.policy!r}"
            )
        return rows

    @abstractmethod
    def _takes_over(self, rows: RowState) -> bool:
        """Whether the policy can go on with rows that another one left."""

    def _load_stored(self, state: Mapping[str, Any], batch: int, used: int) -> None:
        self.storage.load_state(state, batch, used)


def _new(
    kind: type[ComposedKVCache], policy: Policy, storage: type[Storage], storage_args: Mapping[str, Any]
) -> ComposedKVCache:
    """A cache of these parts without its state, for `pickle`."""
    made = kind.made_of(policy, storage, storage_args)
    return made.__new__(made)


_CLASSES: dict[tuple, type[ComposedKVCache]] = {}
