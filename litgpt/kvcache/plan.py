"""What a forward call does in a cache, planned from positions alone.

Positions are host integers, so which slots are written, which are read and under which mask is decided once per forward,
outside the layers; every layer with the same policy, window and history runs the same plan, which is tensor code only.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from litgpt.device_tensor import device_tensor
from litgpt.kvcache.policies.base import PositionalPolicy
from litgpt.masks import Consecutive, PositionMask, position_bias

if TYPE_CHECKING:
    from litgpt.kvcache.blocks import Sealing
    from litgpt.kvcache.score_plan import Boundary
    from litgpt.kvcache.tails import Tails

READ_BUCKET = 256  # a static decode step reads a multiple of this many slots


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
    boundary: "Boundary | None" = None
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
    tails: "Tails | None" = None


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
    boundaries: "tuple[Boundary | Sealing, ...]" = ()
    fields_prepared: tuple[tuple[int, ...], ...] = ()
    fields_after: tuple[tuple[int, ...], ...] = ()
    together: Part | None = None

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


def plan_call(
    policy: PositionalPolicy,
    window: int | None,
    lengths: Sequence[int],
    rows: Sequence[int] | None,
    T: int | Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    static: bool = False,
) -> Plan:
    """Plan a call that brings T new tokens to each of `rows` (None: all), which hold `lengths` tokens so far.

    Args:
        policy, window: of the cache and its layer.
        lengths: tokens so far of every row in use, also of those not in `rows`.
        rows: rows of the cache that the call's batch stands for.
        T: new tokens of every row, or of each its own: then they lie one row after the other in the call.
        dtype: of masks, which is that of queries.
        device: of the plan's tensors.
        static: plan a single token with tensors whose shapes depend on buckets of the length only, for compiled code.
    """
    chosen = range(len(lengths)) if rows is None else rows
    before = [lengths[row] for row in chosen]
    if T == 1 and (static or len(set(before)) > 1):
        after = list(lengths)
        for row in chosen:
            after[row] += 1
        row_index = None if rows is None else device_tensor(list(rows), device)
        parts = [Part([_decode_step(policy, window, before, dtype, device, static)], rows=row_index)]
        return Plan(parts, tuple(lengths), tuple(after))
    return plan_by_length(
        lengths,
        rows,
        T,
        device,
        lambda start, size: (
            _uniform_steps(policy, window, start, size, dtype, device),
            _ring(policy, window, start, size, device),
        ),
    )


def plan_by_length(
    lengths: Sequence[int],
    rows: Sequence[int] | None,
    T: int | Sequence[int],
    device: torch.device,
    plan_part: Callable[[int, int], tuple[list[Step], Ring | None]],
) -> Plan:
    """Plan a call of which `plan_part(start, size)` plans what rows do that hold `start` tokens and get `size` new ones. Other
    arguments as for `plan_call`."""
    chosen = range(len(lengths)) if rows is None else rows
    packed = not isinstance(T, int)
    sizes = list(T) if packed else [T] * len(chosen)
    after, groups = list(lengths), defaultdict(list)
    for i, (row, size) in enumerate(zip(chosen, sizes, strict=True)):
        after[row] += size
        groups[lengths[row], size].append(i)
    row_index = None if rows is None else device_tensor(list(rows), device)
    ends = list(itertools.accumulate(sizes))
    parts = []
    for (length, size), members in groups.items():
        steps, ring = plan_part(length, size)
        if packed:
            spans = [slice(ends[i] - size, ends[i]) for i in members]
            own = device_tensor([chosen[i] for i in members], device)
            parts.append(Part(steps, None, own, spans, ring))
        elif len(groups) == 1:
            parts.append(Part(steps, None, row_index, None, ring))
        else:
            chunk_rows = device_tensor(members, device)
            own = chunk_rows if rows is None else row_index[chunk_rows]
            parts.append(Part(steps, chunk_rows, own, None, ring))
    return Plan(parts, tuple(lengths), tuple(after))


def _uniform_steps(
    policy: PositionalPolicy, window: int | None, start: int, T: int, dtype: torch.dtype, device: torch.device
) -> list[Step]:
    """Steps for rows that all hold `start` tokens."""
    stop = start + T
    seen = policy.reach if window is None else min(window, policy.reach)
    if start == 0:
        written = _span(policy.cached_positions(stop), 0, stop, device)
        return [
            Step(
                slice(0, T),
                new=slice(0, T),
                consecutive=Consecutive(T, T, window, dtype, device),
                write=slice(0, T) if len(written) == T else written,
                slots=policy.slots(written),
            )
        ]
    new = torch.arange(start, stop, device=device)
    if stop <= policy.cache_length:
        first = 0 if window is None else max(0, start + 1 - window)
        return [
            Step(
                slice(0, T),
                read=slice(first, stop),
                consecutive=Consecutive(T, stop - first, window, dtype, device),
                write=slice(0, T),
                slots=policy.slots(new),
                write_first=True,
            )
        ]
    if T <= policy.reach - seen + 1:  # nothing that a query sees is overwritten
        bias = None
        if T > 1 or seen < policy.reach or (window is not None and policy.n_sink):
            stored = policy.slot_positions(device_tensor([stop], device))[0]
            bias = position_bias(new, stored, dtype, window=window, reach=policy.reach, n_sink=policy.n_sink)
        whole = slice(0, policy.cache_length)
        return [Step(slice(0, T), whole, None, bias, None, slice(0, T), policy.slots(new), True)]
    return _attend_then_evict(policy, window, start, T, dtype, device)


def _attend_then_evict(
    policy: PositionalPolicy, window: int | None, start: int, T: int, dtype: torch.dtype, device: torch.device
) -> list[Step]:
    """Steps of a chunk whose own tokens evict what its first queries still see: a part of the chunk attends, then it is stored."""
    size = min(512, max(64, policy.cache_length))
    masks: dict[tuple[int, ...], dict[str, PositionMask | Consecutive]] = {}
    seen, steps = policy.reach if window is None else min(window, policy.reach), []
    for q0 in range(0, T, size):
        q1 = min(q0 + size, T)
        first, stop = start + q0, start + q1
        old = _span(policy.cached_positions(first), 0, first, device)
        # once all slots are taken, masks depend on differences of positions only, unless a window moves over the sinks
        moves = window is not None and policy.n_sink > 0
        kind = (first if moves else min(first, policy.cache_length), q1 - q0)
        if kind not in masks and policy.n_sink == 0:
            masks[kind] = {"consecutive": Consecutive(q1 - q0, len(old) + q1 - q0, seen, dtype, device)}
        elif kind not in masks:
            queries = torch.arange(first, stop, device=device)
            keys = torch.cat((old, queries))
            mask = PositionMask(queries, keys, dtype, window=window, reach=policy.reach, n_sink=policy.n_sink)
            masks[kind] = {"mask": mask}
        kept = _span(policy.cached_positions(stop), first, stop, device)
        steps.append(
            Step(
                slice(q0, q1),
                read=policy.slots(old),
                new=slice(q0, q1),
                write=slice(q0, q1) if len(kept) == q1 - q0 else kept - start,
                slots=policy.slots(kept),
                **masks[kind],
            )
        )
    return steps


def _ring(policy: PositionalPolicy, window: int | None, start: int, T: int, device: torch.device) -> Ring | None:
    """The steps of rows that hold `start` tokens as one; None where no token is replaced, or a window leaves the first ones."""
    stop = start + T
    if start == 0 or T == 1 or stop <= policy.cache_length or (window is not None and policy.n_sink):
        return None
    old = _span(policy.cached_positions(start), 0, start, device)
    kept = _span(policy.cached_positions(stop), start, stop, device)
    return Ring(
        policy.slots(old),
        policy.reach if window is None else min(window, policy.reach),
        policy.n_sink,
        slice(0, T) if len(kept) == T else kept - start,
        policy.slots(kept),
    )


def _decode_step(
    policy: PositionalPolicy,
    window: int | None,
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
    static: bool,
) -> Step:
    """One new token for rows of different lengths, or of any length with shapes that do not follow it (`static`)."""
    used = min(max(lengths) + 1, policy.cache_length)
    if static:
        used = policy.cache_length if policy.evicts else min(read_bucket(used), policy.cache_length)
    if len(set(lengths)) == 1:
        lengths = lengths[:1]
    positions = device_tensor(lengths, device)
    if max(lengths) < policy.cache_length:  # in order, and nothing has to go
        stored, reach = torch.arange(used, device=device)[None], None
    else:
        stored, reach = policy.slot_positions(positions + 1)[:, :used], policy.reach
    bias = position_bias(positions[:, None], stored, dtype, window=window, reach=reach, n_sink=policy.n_sink).unsqueeze(
        1
    )
    slots = policy.slots(positions)
    whole = slice(0, 1)
    return Step(whole, None, None, bias, None, whole, slots if len(lengths) == 1 else slots[:, None], True)


def read_bucket(length: int) -> int:
    """`length` rounded up to what a static decode step reads of a dense cache."""
    return -(-length // READ_BUCKET) * READ_BUCKET


def _span(ranges: tuple[range, range], start: int, stop: int, device: torch.device) -> torch.Tensor:
    """The positions of both ranges that lie in [start, stop), ascending, (N,) int64."""
    parts = [torch.arange(max(r.start, start), max(min(r.stop, stop), r.start, start), device=device) for r in ranges]
    return torch.cat(parts) if len(parts[0]) else parts[1]
