"""What a call does in a cache whose policy scores tokens: when it scores them, the host knows.

New tokens are appended to a row's slots. A row's tail are its tokens since the policy last looked; at a *boundary*, before the
token that needs room, the policy looks at the tail's queries and, if all slots are taken, says which tokens stay. Between
boundaries, the slots in use are in the order of their positions, so that queries see what stands before them.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from litgpt.device_tensor import device_tensor, position_tensor
from litgpt.kvcache.plan import Boundary, Part, Plan, Step, plan_parts
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tails import Piece, RowNumbers, Tails, cut
from litgpt.masks import Consecutive, position_bias


def plan_score_call(
    policy: ScorePolicy,
    state: Sequence[RowNumbers],
    rows: Sequence[int] | None,
    T: int | Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    static: bool = False,
) -> Plan:
    """Plan a call, as `litgpt.kvcache.positional_plan.plan_call` does for policies of positions. `state` has every row in use."""
    planner = _Planner(policy, rows, dtype, device)
    chosen = list(range(len(state))) if rows is None else list(rows)
    sizes = [T] * len(chosen) if isinstance(T, int) else list(T)
    prepared, after, pieces = list(state), list(state), []
    for row, size in zip(chosen, sizes, strict=True):
        own, after[row] = cut(policy, state[row], size)
        prepared[row] = own[0].bounded or own[0].row
        pieces.append(own)
    boundaries: list[Boundary] = []

    def plan_part(members: list[int]) -> Part:
        steps, first = planner.steps(members, [pieces[i] for i in members], chosen)
        boundaries.extend([] if first is None else [first])
        if len(steps) == 1:
            return Part(steps)
        return Part(
            steps, tails=Tails(policy, pieces[members[0]], [prepared[chosen[i]] for i in members], prepared=True)
        )

    if T == 1 and (static or len({(own[0].row.filled, own[0].bounded is None) for own in pieces}) > 1):
        bounded: dict[tuple, list[int]] = defaultdict(list)
        for i, own in enumerate(pieces):
            if own[0].bounded is not None:
                bounded[planner.kind(own[0])].append(i)
        boundaries += [
            planner.boundary(members, [pieces[i][0] for i in members], chosen) for members in bounded.values()
        ]
        row_index = None if rows is None else planner.tensor(list(rows))
        parts = [Part([planner.decode_step([own[0] for own in pieces], static)], rows=row_index)]
    else:
        kinds = [(planner.kind(own[0]), size) for own, size in zip(pieces, sizes, strict=True)]
        parts = plan_parts(kinds, sizes, rows, not isinstance(T, int), device, plan_part)
    lengths = (tuple(row.length for row in rows) for rows in (state, after))
    return Plan(parts, *lengths, tuple(boundaries), _fields(prepared), _fields(after))


def _fields(rows: Sequence[RowNumbers]) -> tuple[tuple[int, ...], ...]:
    """The numbers of rows by kind, as a `RowState` has them."""
    return tuple(zip(*((row.length, row.filled, row.evicted_at, row.observed_at) for row in rows), strict=True))


class _Planner:
    """Makes the steps and boundaries of one call."""

    def __init__(
        self, policy: ScorePolicy, rows: Sequence[int] | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.policy, self.dtype, self.device = policy, dtype, device
        self.all_rows = rows is None

    def tensor(self, numbers: list) -> torch.Tensor:
        return device_tensor(numbers, self.device)

    def kind(self, piece: Piece) -> tuple:
        """Rows of one kind have the same steps, but for the numbers in tensors."""
        tail = piece.row.length - piece.row.observed_at if self.policy.observes else 0
        return piece.row.filled, tail, piece.row.length == 0

    def boundary(self, members: list[int], pieces: list[Piece], chosen: list[int]) -> Boundary:
        """The boundary at the beginning of these pieces, of the `members` of the call's rows."""
        policy, rows = self.policy, [piece.row for piece in pieces]
        filled, tail = rows[0].filled, rows[0].length - rows[0].observed_at
        n_queries = min(policy.n_queries, tail if policy.observes else filled)
        last = self.tensor([row.length for row in rows])
        positions = last[:, None] - n_queries + torch.arange(n_queries, device=self.device)
        return Boundary(
            batch_size=len(rows),
            rows=None if self.all_rows and len(members) == len(chosen) else self.tensor([chosen[i] for i in members]),
            filled=filled,
            observed=filled - tail if policy.observes else filled,
            held=self.tensor([policy.kept if row.evicted_at else 0 for row in rows]).view(-1, 1, 1),
            shift=self.tensor([row.length - filled for row in rows]).view(-1, 1, 1),
            query_positions=positions,
            query_slots=positions % max(1, policy.n_queries),
            keep=policy.kept if filled == policy.cache_length else None,
        )

    def steps(
        self, members: list[int], pieces: list[list[Piece]], chosen: list[int]
    ) -> tuple[list[Step], Boundary | None]:
        """The steps of rows of one kind, and the boundary before the first one."""
        steps, start, first = [], 0, None
        for of_rows in zip(*pieces, strict=True):
            piece = of_rows[0]
            whole = slice(start, start + piece.size)
            filled = piece.row.filled if piece.bounded is None else piece.bounded.filled
            boundary = None if piece.bounded is None else self.boundary(members, list(of_rows), chosen)
            if start == 0:
                first, boundary = boundary, None
            stop = filled + piece.size
            evicts = piece.prompt and piece.size > self.policy.cache_length
            slots = None
            if not evicts:
                single = piece.size == 1
                slots = (
                    position_tensor(filled, self.device) if single else torch.arange(filled, stop, device=self.device)
                )
            steps.append(
                Step(
                    whole,
                    read=None if filled == 0 else slice(0, stop),
                    new=whole if filled == 0 else None,
                    consecutive=Consecutive(piece.size, stop, None, self.dtype, self.device),
                    write=None if evicts else whole,
                    slots=slots,
                    write_first=filled > 0,
                    boundary=boundary,
                    prompt=piece.prompt,
                    **self.kept_queries([one.row.length for one in of_rows], start, piece.size),
                )
            )
            start += piece.size
        return steps, first

    def kept_queries(self, lengths: list[int], start: int, size: int) -> dict[str, slice | torch.Tensor]:
        """Which queries are kept, and where, of tokens that follow `lengths` others: the last ones that the policy may ask for."""
        if not self.policy.n_queries:
            return {}
        kept = min(size, self.policy.n_queries)
        if len(set(lengths)) == 1:
            lengths = lengths[:1]
        slots = self.tensor(lengths)[:, None] + torch.arange(size - kept, size, device=self.device)
        slots %= self.policy.n_queries
        return {
            "kept_queries": slice(start + size - kept, start + size),
            "query_slots": slots[0] if len(lengths) == 1 else slots,
        }

    def decode_step(self, pieces: list[Piece], static: bool) -> Step:
        """One new token for rows that differ, or with shapes that depend on no row (`static`)."""
        filled = [(piece.bounded or piece.row).filled for piece in pieces]
        used = self.policy.cache_length if static else max(filled) + 1
        if len(set(filled)) == 1:
            filled = filled[:1]
        slots = self.tensor(filled)[:, None]
        bias = position_bias(slots, torch.arange(used, device=self.device)[None], self.dtype).unsqueeze(1)
        whole = slice(0, 1)
        queries = self.kept_queries([piece.row.length for piece in pieces], 0, 1)
        return Step(
            whole, bias=bias, write=whole, slots=slots[0] if len(filled) == 1 else slots, write_first=True, **queries
        )
