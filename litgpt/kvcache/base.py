"""What every key-value cache is: its parameters and its contract.

Letters as in `litgpt.attention`; C is the number of slots of a cache (`cache_length`), N the number of slots in use.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from litgpt.attention import KeysAndValues
from litgpt.config import Config
from litgpt.kvcache.plan import Plan, Unplanned


@dataclass(frozen=True)
class KVCacheParams:
    """Size and place of a cache: `batch_size` x `n_query_groups` x `cache_length` x `head_size`, twice.

    With a `value_size`, values are the first that many elements of the keys and take no place of their own.
    """

    batch_size: int
    n_query_groups: int
    cache_length: int
    head_size: int
    n_head: int
    device: torch.device | None
    dtype: torch.dtype | None
    value_size: int | None = None

    @staticmethod
    def from_config(
        config: Config,
        batch_size: int,
        cache_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        head_size: int | None = None,
    ) -> "KVCacheParams":
        return KVCacheParams(
            batch_size=batch_size,
            n_query_groups=config.cache_groups,
            cache_length=cache_length,
            head_size=config.cache_head_size if head_size is None else head_size,
            n_head=config.n_head,
            device=device,
            dtype=dtype,
            value_size=config.cache_value_size,
        )


class KVCache(nn.Module, ABC):
    """Keys and values of the tokens that one layer may still attend to.

    Called once per forward of its layer, with the new tokens' queries, keys and values; it stores what its policy keeps
    and returns the attention output. `input_pos=0` starts new sequences, `input_pos > 0` continues them.

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
        self.cache_length = cache_length
        self.block_idx = block_idx
        self.n_query_groups = config.cache_groups
        self.n_head = config.n_head
        self.head_size = config.cache_head_size if head_size is None else head_size
        self.value_size = config.cache_value_size
        self._dtype = torch.get_default_dtype() if dtype is None else dtype

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
        if rows is not None:
            raise ValueError(f"{type(self).__name__} takes all rows together, got rows={list(rows)}")
        if input_pos not in (0, self.next_token_pos):
            raise ValueError(f"input_pos={input_pos}, but the next token's position is {self.next_token_pos}")
        return Unplanned(input_pos, batch_size)

    def is_chunk_invariant(self, length: int) -> bool:
        """Whether the outputs for a sequence of that many tokens do not depend on how it is cut into calls."""
        return length <= self.cache_length

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
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` as planned. `sinks` (H,) are scores as in `litgpt.attention.scaled_dot_product_attention`."""
        if sinks is not None:
            raise ValueError(f"{type(self).__name__} does not know attention sinks")
        return self(query, key, value, token_idx, plan.input_pos)

    def commit(self, plan: Plan | Unplanned) -> None:
        """Note that `plan` was run in all layers."""

    def clear(self) -> None:
        """Forget everything; the next call has to be a prefill."""

    @property
    def unbounded(self) -> bool:
        """Whether sequences may be longer than the model's context: all that is seen stays within its distances."""
        return False

    @property
    def crop_limit(self) -> int:
        """Least n that `crop` accepts, next to 0."""
        return self.next_token_pos

    @property
    def supports_crop(self) -> bool:
        """Whether `crop` goes back to any earlier point: nothing that later tokens would see was evicted."""
        return self.crop_limit == 0

    def crop(self, n: int) -> None:
        """Go back to when `next_token_pos` was n: the last tokens of every row are forgotten."""
        raise ValueError(
            f"{type(self).__name__} cannot crop (to {n} of {self.next_token_pos} tokens): start anew instead"
        )

    def rewind(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens."""
        if any(count != counts[0] for count in counts):
            raise ValueError(f"{type(self).__name__} takes all rows together, got counts={list(counts)}")
        if counts[0]:
            self.crop(self.next_token_pos - counts[0])

    @property
    def max_tokens_tentative(self) -> int:
        """Most tokens that a call may bring such that all but the first of them can be rewound, in every row."""
        return 1

    @property
    @abstractmethod
    def next_token_pos(self) -> int:
        """The `input_pos` that the next call has to give (0: nothing stored)."""

    @property
    @abstractmethod
    def max_tokens_forward(self) -> int:
        """Most tokens that a call with `input_pos > 0` should bring."""

    @property
    @abstractmethod
    def max_prefill_length(self) -> int | None:
        """Most tokens that a call with `input_pos=0` may bring (None: any number)."""

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
