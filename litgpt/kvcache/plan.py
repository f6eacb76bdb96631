"""What a forward call does in a cache.

Positions are host integers, so which slots are written, which are read and under which mask is decided once per forward,
outside the layers; every layer with the same policy, window and history runs the same plan, which is tensor code only. Plans
are made in `litgpt.kvcache.positional_plan` and `litgpt.kvcache.score_plan`.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from litgpt.device_tensor import device_tensor
from litgpt.kvcache.tails import Tails
from litgpt.masks import Consecutive, PositionMask


class Sealed:
    """Of a storage that encodes tokens many at a time: how many of the first tokens queries see encoded, row by row (or one for all),
    and how many slots the others share, in which that at position p has slot p modulo their number. The last step of a chunk says
    which of its tokens have slots in the end (`kept`, counted from its own first one), and which they are."""

    def __init__(
        self, counts: tuple[int, ...], slots: int, kept: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        self.counts, self.slots, self.kept = counts, slots, kept
        self._by_row: torch.Tensor | None = None

    def by_row(self, batch_size: int) -> torch.Tensor:
        """Counts of every row, (B,) int64."""
        if self._by_row is None:
            self._by_row = torch.tensor(self.counts).expand(batch_size).contiguous()
        return self._by_row


@dataclass(frozen=True)
class Sealing:
    """The tokens of a window, from `start` on, of `rows` (None: the first `batch_size`), that a call has to encode first."""

    start: int
    rows: torch.Tensor | None
    batch_size: int


@dataclass(frozen=True)
class Boundary:
    """In a cache whose policy scores tokens: rows whose tail ends here.

    Attributes:
        batch_size: B, number of rows.
        rows: rows of the cache (B,), or None: the first ones.
        filled: slots in use, the same in all rows.
        observed: how many of them the policy saw before.
        held: how many of them have positions that the cache has noted, (B, 1, 1).
        shift: what the positions of the others are ahead of their slots, (B, 1, 1).
        query_positions: of the queries that the policy sees (B, n), ascending.
        query_slots: where these are, (B, n).
        keep: number of slots that stay (None: all).
    """

    batch_size: int
    rows: torch.Tensor | None
    filled: int
    observed: int
    held: torch.Tensor
    shift: torch.Tensor
    query_positions: torch.Tensor
    query_slots: torch.Tensor
    keep: int | None


@dataclass(frozen=True)
class Step:
    """Queries of one chunk, the keys they see, and the tokens written to slots before or after.

    Attributes:
        queries: tokens of the chunk that attend.
        read: slots attended to, a slice or (N,) indices (None: none).
        new: tokens of the chunk attended to directly, following those read (None: none). With neither `read` nor `new`
            it is the first slots, as many as the mask has columns: a number that compiled code takes from its shape.
        bias: additive mask, broadcastable to (B, H, T, keys), or None.
        consecutive: in place of `bias`, where keys stand at consecutive positions and queries are the last of them.
        write: tokens of the chunk that are stored, a slice or indices (None: none).
        slots: where, (T,) or (B, T).
        write_first: store before attending.
        boundary: in a cache whose policy scores tokens, what comes before the step (None: nothing).
        prompt: there, whether the chunk is a prompt that the policy looks at at once; with no `write` it says what is stored.
        kept_queries: tokens of the chunk whose queries the policy may ask for later (None: none).
        query_slots: where these are kept, (n,) or (B, n).
        mask: in place of `bias`, one that is made when it is needed.
        sealed: which tokens are encoded, in caches that encode many at a time.
    """

    queries: slice
    read: slice | torch.Tensor | None = None
    new: slice | None = None
    bias: torch.Tensor | None = None
    consecutive: Consecutive | None = None
    write: slice | torch.Tensor | None = None
    slots: torch.Tensor | None = None
    write_first: bool = False
    boundary: Boundary | None = None
    prompt: bool = False
    kept_queries: slice | None = None
    query_slots: torch.Tensor | None = None
    mask: PositionMask | None = None
    sealed: Sealed | None = None


@dataclass(frozen=True)
class Ring:
    """What all steps of a part do together, where new tokens replace others that they still see.

    Attributes:
        old: slots of the earlier tokens that are seen, in the order of their positions.
        seen: how many of the last tokens a token sees, itself included.
        n_sink: and how many of the first.
        write, slots: as in `Step`.
    """

    old: torch.Tensor
    seen: int
    n_sink: int
    write: slice | torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class Part:
    """Steps for some rows of the call. `chunk_rows` index the call's rows, `rows` those of the cache (None: all). In a call
    whose rows lie one after the other, `spans` are the tokens of each. `tails` are what kernels need of several steps between which
    a policy scores tokens."""

    steps: list[Step]
    chunk_rows: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    spans: list[slice] | None = None
    ring: Ring | None = None
    tails: Tails | None = None


@dataclass(frozen=True)
class Plan:
    """All that a call does in one cache, and how many tokens each row in use has before and after it.

    Attributes:
        boundaries: what a cache does before the layers run: its policy scores tokens, or its storage encodes them.
        fields_prepared, fields_after: and the numbers of its rows after these boundaries, and after the call, by kind.
        together: one step in place of all parts, where kernels can do it and others cannot (None: there is none).
    """

    parts: list[Part]
    before: tuple[int, ...]
    after: tuple[int, ...]
    boundaries: tuple[Boundary | Sealing, ...] = ()
    fields_prepared: tuple[tuple[int, ...], ...] = ()
    fields_after: tuple[tuple[int, ...], ...] = ()
    together: Part | None = None

    @property
    def needs_preparing(self) -> bool:
        """Whether caches may have something to do before the layers run."""
        return bool(self.boundaries) or not any(self.before)

    @cached_property
    def without_boundaries(self) -> "Plan":
        """What is left after them."""
        return replace(self, boundaries=())


@dataclass(frozen=True)
class Unplanned:
    """Stands for a plan where a cache does all of its work in `forward`. No steps are known of it."""

    input_pos: int
    batch_size: int
    parts: tuple[Part, ...] = ()

    @property
    def before(self) -> tuple[int, ...]:
        return (self.input_pos,) * self.batch_size


def plan_parts(
    kinds: Sequence[Hashable],
    sizes: Sequence[int],
    rows: Sequence[int] | None,
    packed: bool,
    device: torch.device,
    plan_part: Callable[[list[int]], Part],
) -> list[Part]:
    """The parts of a call: `plan_part(members)` plans what those of its rows do, counted from 0, that are of one kind.

    Args:
        kinds: of each of the call's rows.
        sizes: new tokens of each.
        rows: of the cache, that they stand for (None: the first ones).
        packed: they lie one after the other.
        device: of the plan's tensors.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, kind in enumerate(kinds):
        groups[kind].append(i)
    row_index = None if rows is None else device_tensor(list(rows), device)
    ends, parts = list(accumulate(sizes)), []
    for members in groups.values():
        part = plan_part(members)
        if packed:
            own = device_tensor([i if rows is None else rows[i] for i in members], device)
            part = replace(part, rows=own, spans=[slice(ends[i] - sizes[i], ends[i]) for i in members])
        elif len(groups) == 1:
            part = replace(part, rows=row_index)
        else:
            chunk_rows = device_tensor(members, device)
            own = chunk_rows if row_index is None else row_index[chunk_rows]
            part = replace(part, chunk_rows=chunk_rows, rows=own)
        parts.append(part)
    return parts
