"""Plans of calls in caches whose policy decides by positions alone."""

from collections.abc import Callable, Sequence

import torch

from litgpt.device_tensor import device_tensor, position_tensor
from litgpt.kvcache.plan import Part, Plan, Ring, Step, plan_parts
from litgpt.kvcache.policies.base import PositionalPolicy
from litgpt.masks import Consecutive, PositionMask, position_bias

READ_BUCKET = 256  # a static decode step reads a multiple of this many slots


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
    if T == 1 and rows is None:
        parts = [Part(_uniform_steps(policy, window, before[0], 1, dtype, device))]
        return Plan(parts, tuple(lengths), tuple(length + 1 for length in lengths))
    return plan_by_length(
        lengths,
        rows,
        T,
        device,
        lambda start, size: Part(
            _uniform_steps(policy, window, start, size, dtype, device),
            ring=_ring(policy, window, start, size, device),
        ),
    )


def plan_by_length(
    lengths: Sequence[int],
    rows: Sequence[int] | None,
    T: int | Sequence[int],
    device: torch.device,
    plan_part: Callable[[int, int], Part],
) -> Plan:
    """Plan a call of which `plan_part(start, size)` plans what rows do that hold `start` tokens and get `size` new ones. Other
    arguments as for `plan_call`."""
    chosen = range(len(lengths)) if rows is None else rows
    sizes = [T] * len(chosen) if isinstance(T, int) else list(T)
    after, kinds = list(lengths), [(lengths[row], size) for row, size in zip(chosen, sizes, strict=True)]
    for row, size in zip(chosen, sizes, strict=True):
        after[row] += size
    packed = not isinstance(T, int)
    parts = plan_parts(kinds, sizes, rows, packed, device, lambda members: plan_part(*kinds[members[0]]))
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
    new = position_tensor(start, device) if T == 1 else torch.arange(start, stop, device=device)
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
