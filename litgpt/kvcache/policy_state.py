"""What a policy that scores tokens has to know of earlier calls, next to keys and values."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from litgpt.kvcache.changes import NotesChanges
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.plan import Boundary, Step
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.storages.base import move_rows, write_slots
from litgpt.kvcache.tokens import CachedTokens

BY_SLOT = ("positions", "slot_state")


class PolicyState(NotesChanges):
    """Buffers of a cache, those that its policy asks for:

    - `positions` (batch_size, G, C), int32: of the tokens that have stayed, in the first slots
    - `slot_state` (batch_size, S, G, C), float32: the policy's own numbers of every token
    - `queries` (batch_size, H, n, D): of the last tokens, that at position p in slot p modulo n
    - `row_state` (batch_size, H, F), float32: the policy's own numbers of every row and head
    """

    def __init__(self, policy: ScorePolicy, params: KVCacheParams) -> None:
        super().__init__()
        self.policy = policy
        with torch.inference_mode(False):  # buffers outlive the call that makes them
            for name, (shape, dtype) in _buffers(policy, params).items():
                self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=params.device), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> "PolicyState":
        exact = {name: x for name, x in self.named_buffers() if name != "queries"}
        super()._apply(*args, **kwargs)
        for name, x in exact.items():  # sums stay float32, whatever the model becomes
            setattr(self, name, x.to(getattr(self, name).device))
        return self

    def kept_queries(self) -> torch.Tensor | None:
        return self._buffers.get("queries")  # not `self.queries`: see `DefaultStorage.kernel_view`

    def kept_numbers(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Buffers of positions, and of the policy's numbers of tokens, if there are any."""
        return self._buffers["positions"], self._buffers.get("slot_state")

    def of_head(self, policy: ScorePolicy, slots: slice, heads: slice) -> "PolicyState":
        """The state of a head of keys and values that has these slots of the only one, for these heads of queries: views."""
        part = copy.copy(self)
        part.policy = policy
        part._buffers = {
            name: x[..., slots] if name in BY_SLOT else x[:, heads] for name, x in self.named_buffers(recurse=False)
        }
        return part

    # -- what policies are shown

    def positions_in(
        self, rows: torch.Tensor | None, batch: int, used: int, held: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        """Positions in the first `used` slots, (B, G, used); other arguments as in `Boundary`."""
        slots = torch.arange(used, device=self.positions.device)
        return torch.where(slots < held, _rows(self.positions, rows, batch)[..., :used].long(), slots + shift)

    def queries_at(self, boundary: Boundary) -> torch.Tensor | None:
        """(B, H, n, D); None if the policy asks for none."""
        if (queries := self.kept_queries()) is None:
            return None
        row = torch.arange(boundary.batch_size, device=queries.device) if boundary.rows is None else boundary.rows
        return queries[row[:, None], :, boundary.query_slots].transpose(1, 2)

    def numbers(
        self, rows: torch.Tensor | None, batch: int, used: int, observed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`slot_state` and `row_state` of `CachedTokens` for the first `used` slots: zeros in all that the policy did not see."""
        positions, known = self.kept_numbers()
        slot_state = positions.new_zeros(
            (0 if known is None else known.shape[1], batch, positions.shape[1], used), dtype=torch.float32
        )
        if known is not None and observed:
            slot_state[..., :observed] = _rows(known, rows, batch)[..., :observed].transpose(0, 1)
        row_state = slot_state[:0]
        if "row_state" in self._buffers:
            row_state = _rows(self.row_state, rows, batch)
            row_state = row_state if observed else torch.zeros_like(row_state)
        return slot_state, row_state

    # -- what is noted

    def keep_queries(self, step: Step, rows: torch.Tensor | None, query: torch.Tensor) -> None:
        """Keep those of a call's queries (B, H, T, D) that the policy may ask for after a step."""
        if step.kept_queries is not None:
            write_slots(self.queries, query[:, :, step.kept_queries].detach(), step.query_slots, rows)

    def choose(self, tokens: CachedTokens, rows: torch.Tensor | None, evicts: bool) -> torch.Tensor | None:
        """Let the policy look at tokens of `rows`, and note what it is to know later. Slots (B, G, n) of those that stay, if some go."""
        if self.policy.observes:
            self.policy.observe(tokens)
        index = self.policy.best(tokens) if evicts else None
        self.note(tokens, index, rows)
        return index

    def note(self, tokens: CachedTokens, index: torch.Tensor | None, rows: torch.Tensor | None) -> None:
        """Keep the policy's numbers, and the positions of the tokens in the slots that stay, `index` (B, G, n) (None: all)."""
        known = {"slot_state": tokens.slot_state.transpose(0, 1)} if "slot_state" in self._buffers else {}
        if index is not None:
            positions = tokens.positions.expand(*index.shape[:2], -1).gather(2, index)
            known = {name: x.gather(3, index[:, None].expand(-1, x.shape[1], -1, -1)) for name, x in known.items()}
            known["positions"] = positions.int()
        if "row_state" in self._buffers and tokens.row_state.numel():
            known["row_state"] = tokens.row_state
        row = slice(tokens.shape[0]) if rows is None else rows
        for name, x in known.items():
            getattr(self, name)[row, ..., : x.shape[-1]] = x

    # -- between calls

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        move_rows(self.buffers(), rows)

    def state(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        """What is known of the first `used` slots of the first `batch` rows: views of the buffers."""
        return {name: x[:batch, ..., :used] if name in BY_SLOT else x[:batch] for name, x in self.named_buffers()}

    def size_in_bits(self) -> dict[str, int]:
        return {name: 8 * x.numel() * x.element_size() for name, x in self.named_buffers()}

    @staticmethod
    def size_in_bits_apriori(policy: ScorePolicy, params: KVCacheParams) -> dict[str, int]:
        """What `size_in_bits` will be."""
        sizes = _buffers(policy, params).items()
        return {name: 8 * dtype.itemsize * torch.Size(shape).numel() for name, (shape, dtype) in sizes}


def _buffers(policy: ScorePolicy, params: KVCacheParams) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes."""
    B, G, H, C = params.batch_size, params.n_query_groups, params.n_head, params.cache_length
    dtype = torch.get_default_dtype() if params.dtype is None else params.dtype
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"positions": ((B, G, C), torch.int32)}
    if policy.slot_state:
        buffers["slot_state"] = (B, policy.slot_state, G, C), torch.float32
    if policy.n_queries:
        buffers["queries"] = (B, H, policy.n_queries, params.head_size), dtype
    if F := policy.row_state(params):
        buffers["row_state"] = (B, H, F), torch.float32
    return buffers


def _rows(buffer: torch.Tensor, rows: torch.Tensor | None, batch: int) -> torch.Tensor:
    return buffer[:batch] if rows is None else buffer[rows]
