"""What every key-value cache is: its contract.

Letters as in `litgpt.attention`; C is the number of slots of a cache (`cache_length`), N the number of slots in use.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from litgpt.config import Config
from litgpt.keys_and_values import KeysAndValues
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.plan import Plan, Unplanned


class KVCache(nn.Module, ABC):
    """Keys and values of the tokens that one layer may still attend to.

    Called once per forward of its layer, with the new tokens' queries, keys and values; it stores what its policy keeps
    and returns the attention output. `input_pos=0` starts new sequences, `input_pos > 0` continues them.

    What is abstract is enough to generate. All else that a model, an engine or a session asks of a cache has a default
    here: it works where that needs nothing more, for rows that have one length and go on together, and is a `ValueError`
    that says so where it does.

    Args:
        config: the model's configuration.
        batch_size: rows that the buffers hold, the largest batch a prefill may bring.
        cache_length: slots per row and head.
        block_idx: the layer that the cache serves.
        dtype: dtype of keys and values (default: torch's default dtype).
        head_size: size of keys and values (default: the configuration's).
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        cache_length: int,
        block_idx: int,
        dtype: torch.dtype | None = None,
        head_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("cache_length", cache_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= block_idx < config.n_layer:
            raise ValueError(f"block_idx must be in 0..{config.n_layer - 1}, got {block_idx}")
        self.config = config
        self.batch_size = batch_size
        self._cache_length = cache_length
        self.block_idx = block_idx
        self.n_head = config.n_head
        self.head_size = config.cache_head_size if head_size is None else head_size
        self.value_size = config.cache_value_size
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        self._rows_in_use = 1  # as the last call said
        self._cleared_at: int | None = None  # `next_token_pos` when it was last cleared

    # -- one call

    @abstractmethod
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, token_idx: torch.Tensor, input_pos: int
    ) -> torch.Tensor:
        """Attend from the new tokens and store what stays of them.

        Args:
            query: (B, H, T, D), after RoPE.
            key, value: (B, G, T, D), keys after RoPE; or values (B, G, T, `value_size`), the beginnings of the keys.
            token_idx: (B, T), the tokens themselves, for policies that look at them.
            input_pos: position of the first new token: 0, or `next_token_pos`.

        Returns:
            Attention output (B, T, H * D).

        Raises:
            ValueError: a wrong batch size, shape or position.
            IndexError: more tokens than the cache can take.
        """

    def plan(
        self,
        input_pos: int,
        batch_size: int,
        T: int | Sequence[int],
        rows: Sequence[int] | None = None,
        static: bool = False,
    ) -> Plan | Unplanned:
        """Decide, outside the layers, what a call of T new tokens for `batch_size` rows is to do.

        A model plans once for all layers whose caches have equal `plan_key`, has every layer `run` the plan, and in the
        end lets the caches `commit` it. Here nothing is planned: `run` is `forward`.

        Args:
            input_pos, batch_size, T: of the call; with `rows`, T may be a number for each, as `GPT.forward` has them.
            rows: rows of the cache that the call's batch stands for (None: the first ones).
            static: plan shapes that do not depend on the position, for compiled code.

        Raises:
            ValueError: a wrong position, or `rows` in a cache that cannot take rows apart.
        """
        together = rows is None or list(rows) == list(range(max(1, len(self.row_lengths)))) == [0]
        if not together:
            raise ValueError(self._refusal(f"call it for rows {list(rows)}"))
        expected = max(self.row_lengths, default=0)
        if input_pos not in (0, expected):
            raise ValueError(f"input_pos={input_pos}, but the next token's position is {expected}")
        return Unplanned(input_pos, batch_size)

    def plan_key(self) -> tuple:
        """Caches with equal keys have equal plans for the same call."""
        return (id(self),)

    def run(
        self,
        plan: Plan | Unplanned,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` as planned. `sink_logits` (H,) as in `litgpt.attention.scaled_dot_product_attention`."""
        if sink_logits is not None:
            raise ValueError(f"{type(self).__name__} does not know a model's learned sink logits")
        output = self(query, key, value, token_idx, plan.input_pos)
        self._rows_in_use, self._cleared_at = plan.batch_size, None
        return output

    def prepare(self, plan: Plan | Unplanned, sink_logits: torch.Tensor | None = None) -> Plan | Unplanned:
        """Do what a call has to do before its layers run, and give what is left for `run`, which otherwise does it itself.

        Equal plans give equal ones. `sink_logits` as for `run`.
        """
        return plan

    def commit(self, plan: Plan | Unplanned) -> None:
        """Note that `plan` was run in all layers."""

    # -- limits

    @property
    def evicts(self) -> bool:
        """Whether a full cache drops tokens to take others. Where it does not, it refuses more than `cache_length`."""
        return True

    @property
    def unbounded(self) -> bool:
        """Whether sequences may be longer than the model's context: all that is seen stays within its distances."""
        return False

    @property
    def takes_rows_apart(self) -> bool:
        """Whether rows may have lengths of their own, come, go and change places: `start`, `extend`, `reorder`, `rewind`
        by row, and calls for some rows."""
        return False

    def is_chunk_invariant(self, length: int) -> bool:
        """Whether the outputs for a sequence of that many tokens do not depend on how it is cut into calls."""
        return length <= self.cache_length

    @property
    @abstractmethod
    def max_tokens_forward(self) -> int:
        """Most tokens that a call with `input_pos > 0` should bring."""

    @property
    @abstractmethod
    def max_prefill_length(self) -> int | None:
        """Most tokens that a call with `input_pos=0` may bring (None: any number)."""

    @property
    def max_rewindable_tokens(self) -> int:
        """Most tokens at the end of the next call that can be rewound after it, in every row."""
        return 0

    def uninterrupted_tokens(self, row: int) -> int | None:
        """How many next tokens of a row can come in one call without an eviction between them that is not planned from their
        positions alone (None: any number)."""
        return None

    # -- rows

    @property
    @abstractmethod
    def next_token_pos(self) -> int:
        """The `input_pos` that the next call has to give (0: nothing stored)."""

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens so far of every row in use."""
        position = self.next_token_pos or 0  # caches made elsewhere may have None for 0
        return (position,) * self._rows_in_use if position and position != self._cleared_at else ()

    def start(self, batch_size: int) -> None:
        """Begin a batch of empty rows, each to be filled by a call with `rows`."""
        if batch_size != 1:
            raise ValueError(self._refusal(f"start {batch_size} empty ones"))
        self.clear()

    def extend(self, count: int) -> None:
        """Let `count` empty rows join the batch, each to be filled by a call with `rows`."""
        raise ValueError(self._refusal(f"extend them by {count}"))

    def reorder(self, rows: Iterable[int]) -> None:
        """Row i becomes what row `rows[i]` was. Rows may be dropped or repeated, as long as `batch_size` holds them."""
        rows = list(rows)
        if rows != list(range(len(self.row_lengths))):
            raise ValueError(self._refusal(f"reorder them to {rows}"))

    # -- going back

    def clear(self) -> None:
        """Forget everything; the next call has to be a prefill."""
        self._cleared_at = self.next_token_pos or 0

    @property
    def crop_limit(self) -> int:
        """Least n that `crop` accepts, next to 0."""
        return max(self.row_lengths, default=0)

    @property
    def supports_crop(self) -> bool:
        """Whether `crop` goes back to any earlier point: nothing that later tokens would see was evicted."""
        return self.crop_limit == 0

    def crop(self, n: int) -> None:
        """Go back to when `next_token_pos` was n: the last tokens of every row are forgotten."""
        end = max(self.row_lengths, default=0)
        if n not in (0, end):
            raise ValueError(f"{type(self).__name__} cannot crop (to {n} of {end} tokens): start anew instead")
        if n == 0:
            self.clear()

    def rewind(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens."""
        if any(count != counts[0] for count in counts):
            raise ValueError(self._refusal(f"rewind them by {list(counts)} tokens"))
        if counts[0]:
            self.crop(max(self.row_lengths, default=0) - counts[0])

    def rewind_limit(self, row: int) -> int:
        """Least number of tokens, next to 0, that a row can go back to."""
        return self.crop_limit

    # -- copies

    def fork(self) -> "KVCache":
        """An independent copy: what is done to one does not show in the other."""
        with torch.inference_mode(False):  # its buffers outlive the call that makes them
            return copy.deepcopy(self, {id(self.config): self.config})

    def empty_copy(self) -> "KVCache":
        """An empty cache of the same kind and size."""
        empty = self.fork()
        empty.clear()
        return empty

    def state(self, row: int | None = None, copy: bool = True) -> dict[str, Any]:
        """What a later `load_state` needs to go on from here: tensors, and what JSON can hold; of all rows, or of one.

        Without `copy`, tensors are views of the buffers, good until the next call.
        """
        raise ValueError(f"{type(self).__name__} cannot give its state, so it cannot be saved or enlarged")

    def load_state(self, state: Mapping[str, Any], row: int | None = None) -> None:
        """Go on from where `state` was taken; with all rows, or with one that is empty."""
        raise ValueError(f"{type(self).__name__} cannot take over a state, so it cannot be loaded")

    def state_of_row(self, row: int, copy: bool = True) -> dict[str, Any]:
        """`state` of one row, as a batch of one would give it."""
        if row or len(self.row_lengths) > 1:
            raise ValueError(self._refusal("give the state of one"))
        return self.state(copy=copy)

    def load_state_of_row(self, row: int, state: Mapping[str, Any]) -> None:
        """Let a row, which is empty, go on from where `state` was taken; the other rows stay as they are.

        Raises:
            ValueError: if the state is of another shape or dtype; nothing is changed then.
        """
        if row or len(self.row_lengths) > 1:
            raise ValueError(self._refusal("take over the state of one"))
        self.load_state(state)

    # -- what is in it

    @abstractmethod
    def get_keys_values(self) -> KeysAndValues | None:
        """What is stored, (B, G, N, D), slot by slot (None: nothing)."""

    @abstractmethod
    def token_positions(self) -> torch.Tensor:
        """Position of the token in every slot in use, (B, G, N), int64; -1 where a shorter row has none."""

    @abstractmethod
    def size_estimate(self) -> tuple[int, dict[str, int]]:
        """Bits allocated, in total and by part."""

    @classmethod
    @abstractmethod
    def size_estimate_apriori(cls, params: KVCacheParams) -> tuple[int, dict[str, int]]:
        """What `size_estimate` of a cache with these parameters will be, without making one."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def cache_length(self) -> int:
        """C, slots per row and head."""
        return self._cache_length

    @property
    def n_query_groups(self) -> int:
        """G, heads of keys and values."""
        return self.config.cache_groups

    def get_params(self) -> KVCacheParams:
        return KVCacheParams(
            batch_size=self.batch_size,
            n_query_groups=self.n_query_groups,
            cache_length=self.cache_length,
            head_size=self.head_size,
            n_head=self.n_head,
            device=self.device,
            dtype=self.dtype,
            value_size=self.value_size,
        )

    def _refusal(self, action: str) -> str:
        return (
            f"{type(self).__name__} takes all rows together, at one length: it cannot {action}. "
            "Generate one sequence at a time, or use another cache"
        )
