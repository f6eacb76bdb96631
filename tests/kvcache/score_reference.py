"""Caches that evict by score, written out token by token in float64: what `ScoreKVCache` and its policies are compared with.

Shares no code with the package. A row keeps the keys, values and queries of all its tokens, and for every head a list of the
positions that are still there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .reference import softmax_attention


@dataclass
class ScoredRow:
    """One sequence. `sums[g][p]`: the weights that all queries so far have put on position p, over the heads of group g."""

    keys: torch.Tensor  # (G, length, D), of all tokens
    values: torch.Tensor
    queries: torch.Tensor  # (H, length, D)
    kept: list[list[int]]
    sums: list[dict[int, float]]
    hits: list[dict[int, list[tuple[int, float]]]]  # queries that saw a position, with the largest weight in the group
    prefill: int = 0
    looked_at: int = 0  # length when the policy last looked
    evicted_at: int = 0
    looks: list[tuple[int, int]] = field(default_factory=list)  # what was new each time the policy looked

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def group_size(self) -> int:
        return self.queries.shape[0] // self.keys.shape[0]

    def cropped(self, length: int) -> "ScoredRow":
        row = copy.deepcopy(self)
        row.keys, row.values, row.queries = (x[:, :length] for x in (self.keys, self.values, self.queries))
        row.kept = [[p for p in kept if p < length] for kept in self.kept]
        if length == 0:
            row.prefill = row.looked_at = row.evicted_at = 0
            row.looks = []
            row.sums, row.hits = [{} for _ in row.sums], [{} for _ in row.sums]
        return row

    def weights(self, position: int, g: int, scale: float, softcap: float | None) -> torch.Tensor:
        """The weights of the query at `position` on what is kept of group g and not after it: (heads of g, kept)."""
        seen = [p for p in self.kept[g] if p <= position]
        heads = slice(g * self.group_size, (g + 1) * self.group_size)
        query, keys = self.queries[heads, position], self.keys[g : g + 1, seen]
        found = softmax_attention(query, keys, keys, scale, softcap)[1]
        return torch.nn.functional.pad(found, (0, len(self.kept[g]) - len(seen)))


@dataclass
class ScoreReference:
    """What a cache with a policy that scores tokens computes. `score(row, g, reference)` gives a number for every kept token."""

    scale: float
    score: Callable[["ScoredRow", int, "ScoreReference"], list[float]]
    cache_length: int
    tail: int
    sinks: int
    recent: int
    looks: bool = False  # whether the policy looks every `tail` tokens
    run: int = 1
    softcap: float | None = None
    layer: int = 0
    rows: list[ScoredRow] = field(default_factory=list)
    as_stored: Callable = lambda key, value: (key, value)  # what is attended to in place of keys and values

    @property
    def end(self) -> int:
        return max((row.length for row in self.rows), default=0)

    def start(self, like: torch.Tensor, batch: int) -> None:
        self.rows = [ScoredRow(*[like[0, :, :0]] * 3, [], [], []) for _ in range(batch)]

    def restart(self, rows: list[int]) -> None:
        for r in rows:
            self.rows[r] = self.rows[r].cropped(0)

    def crop(self, n: int) -> None:
        end = self.end
        self.rows = [row.cropped(max(0, row.length - (end - n))) for row in self.rows]

    def rewind(self, counts: list[int]) -> None:
        self.rows = [row.cropped(row.length - count) for row, count in zip(self.rows, counts, strict=True)]

    def reorder(self, rows: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[r]) for r in rows]

    def call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[int] | None = None
    ) -> torch.Tensor:
        """Bring new tokens (B, heads, T, D) to `rows` (None: all). Returns (B, T, H * D), float64."""
        named = list(range(len(self.rows))) if rows is None else rows
        B, H, T, D = query.shape
        key, value = self.as_stored(key, value)
        output = torch.empty(B, T, H, D, dtype=torch.float64)
        for b, r in enumerate(named):
            row = self.rows[r]
            G = key.shape[1]
            if row.length == 0:
                row.queries = query[b, :, :0]
                row.kept, row.sums, row.hits = [[] for _ in range(G)], [{} for _ in range(G)], [{} for _ in range(G)]
                row.prefill = T
            new = zip(*(x[b].split(1, 1) for x in (query, key, value)), strict=True)
            for t, (q, k, v) in enumerate(new):
                position = row.length
                if position >= row.prefill:
                    self.before(row)
                row.queries, row.keys, row.values = (
                    torch.cat(x, 1) for x in ((row.queries, q), (row.keys, k), (row.values, v))
                )
                for g in range(G):
                    row.kept[g].append(position)
                    heads = slice(g * row.group_size, (g + 1) * row.group_size)
                    output[b, t, heads], weights = softmax_attention(
                        row.queries[heads, position],
                        row.keys[g : g + 1, row.kept[g]],
                        row.values[g : g + 1, row.kept[g]],
                        self.scale,
                        self.softcap,
                    )
                    for p, weight in zip(row.kept[g], weights.sum(0).tolist(), strict=True):
                        row.sums[g][p] = row.sums[g].get(p, 0.0) + weight
                    for p, weight in zip(row.kept[g], weights.amax(0).tolist(), strict=True):
                        row.hits[g].setdefault(p, []).append((position, weight))
            if T == row.prefill == row.length:
                if T > self.cache_length:
                    self.evict(row)
                elif self.looks and self.tail < T:
                    self.look(row)
        return output.flatten(2)

    def before(self, row: ScoredRow) -> None:
        """What happens before a token that follows the prompt."""
        if len(row.kept[0]) == self.cache_length:
            self.evict(row)
        elif self.looks and row.length - row.looked_at == self.tail:
            self.look(row)

    def look(self, row: ScoredRow) -> None:
        row.looks.append((row.looked_at, row.length))
        row.looked_at = row.length

    def evict(self, row: ScoredRow) -> None:
        self.look(row)
        row.evicted_at = row.length
        keep = self.cache_length - self.tail
        chosen = []
        for g, kept in enumerate(row.kept):
            scores = [float(x) for x in self.score(row, g, self)]
            runs = [p // self.run for p in kept]
            of_run = {run: [s for s, r in zip(scores, runs, strict=True) if r == run] for run in set(runs)}
            scores = [sum(of_run[r]) / len(of_run[r]) for r in runs]
            always = kept[: self.sinks] + kept[len(kept) - self.recent :]
            others = sorted(zip(scores, kept, strict=True), reverse=True)  # of equal ones the newer is better
            best = [p for _, p in others if p not in always][: keep - len(always)]
            chosen.append(sorted(always + best))
        row.kept = chosen

    def kept(self, row: ScoredRow, g: int = 0) -> list[int]:
        """Positions that a cache holds in the head g."""
        return row.kept[g] if row.kept else []

    def seen(self, row: ScoredRow, position: int) -> list[int]:
        """Positions that the next token sees, unless its coming makes others go."""
        return self.kept(row)

    def limit(self, row: ScoredRow) -> int:
        """Least length, next to 0, that the row can go back to."""
        return row.looked_at if self.looks else row.evicted_at


def summed(row: ScoredRow, g: int, reference: ScoreReference, last: int) -> torch.Tensor:
    """Weights of the last queries on what is kept, summed over queries and heads, (kept,)."""
    positions = range(max(0, row.length - last), row.length)
    return sum(row.weights(p, g, reference.scale, reference.softcap).sum(0) for p in positions)


def knorm(row, g, reference):
    return [-row.keys[g, p].double().norm() for p in row.kept[g]]


def keydiff(row, g, reference):
    keys = [row.keys[g, p].double() for p in row.kept[g]]
    mean = sum(key / key.norm() for key in keys) / len(keys)
    return [-(key @ mean) / key.norm() / mean.norm() for key in keys]


def h2o(row, g, reference):
    return [row.sums[g][p] for p in row.kept[g]]


def h2o_value_norm(row, g, reference):
    return [row.sums[g][p] * row.values[g, p].double().norm() for p in row.kept[g]]


def kvzip(row, g, reference):
    return [max(weight for _, weight in row.hits[g][p]) for p in row.kept[g]]


def tova(row, g, reference):
    G = row.keys.shape[0]
    of_groups = [summed(row, other, reference, 1) for other in range(G)]
    return sum(of_groups) / G


def snapkv(row, g, reference, window=32, pool=5):
    weights = summed(row, g, reference, min(window, reference.cache_length)).tolist()
    before, own = weights[: len(weights) - reference.recent], weights[len(weights) - reference.recent :]
    half = pool // 2
    pooled = [sum(before[max(0, i - half) : i + half + 1]) / pool for i in range(len(before))]
    return pooled + own


def random(row, g, reference, layer=1):
    scores = []
    for p in row.kept[g]:
        x = p * 0x9E3779B1 + (g + layer * 1024) * 0x85EBCA77
        for multiplier in (0x7FEB352D, 0x846CA68B):
            x = (x ^ x >> 16) * multiplier % 2**32
        scores.append((x ^ x >> 16) >> 8)
    return scores


def lazy(row, g, reference):
    scores = []
    for p in row.kept[g]:
        last, pause = p, 0
        for position, weight in row.hits[g][p]:
            if weight > 1e-4:
                last, pause = position, max(pause, position - last)
        scores.append((last - (row.length - 1)) / (pause + 1))
    return scores


def turned(x, angles):
    """x (..., D) with its first two elements rotated by angles (...): RoPE of the contract's configuration."""
    cos, sin = angles.double().cos()[..., None], angles.double().sin()[..., None]
    return torch.cat((x[..., :1] * cos - x[..., 1:2] * sin, x[..., 1:2] * cos + x[..., :1] * sin, x[..., 2:]), -1)


def expected(row, g, reference, future=512):
    heads = range(g * row.group_size, (g + 1) * row.group_size)
    D = row.keys.shape[-1]
    ahead = (row.length + torch.arange(future))[:, None].expand(-1, D)
    rotation = turned(torch.eye(D, dtype=torch.float64).expand(future, D, D), ahead).mean(0).T
    keys, values = row.keys[g, row.kept[g]].double(), row.values[g, row.kept[g]].double()
    total = 0
    for head in heads:
        positions = torch.arange(reference.sinks, row.length)
        queries = turned(row.queries[head, positions].double(), -positions)
        mean = rotation @ queries.mean(0)
        covariance = (
            rotation @ (queries.T @ queries / len(queries) - queries.mean(0).outer(queries.mean(0))) @ rotation.T
        )
        logits = keys @ mean * reference.scale + ((keys @ covariance) * keys).sum(-1) * reference.scale**2 / 2
        logits[torch.tensor(row.kept[g]) < reference.sinks] = -torch.inf
        total = total + logits.softmax(-1)
    return total / row.group_size * values.norm(dim=-1)


def compactor(row, g, reference):
    G = row.keys.shape[0]
    found = [compactor_parts(row, head, reference) for head in range(G)]
    weight = 1.5 * (1 - (reference.cache_length - reference.tail) / row.length)
    score = 0
    for factor, parts in ((1, [part[0] for part in found]), (weight, [part[1] for part in found])):
        of_all = torch.cat(parts)
        score = score + factor * (parts[g] - of_all.mean()) / (of_all.std(correction=0) + 1e-3)
    return torch.nn.functional.pad(score, (reference.sinks, reference.recent))


def compactor_parts(row, g, reference):
    """Attention and leverage of the tokens of group g that may go."""
    heads = slice(g * row.group_size, (g + 1) * row.group_size)
    seen = {}
    for start, stop in row.looks:
        for first in range(max(start, reference.sinks), stop, 256):
            chunk = range(first, min(first + 256, stop))
            queries, keys = row.queries[heads, chunk].double(), row.keys[g, chunk].double()
            scores = queries @ keys.T * reference.scale
            if reference.softcap is not None:
                scores = reference.softcap * (scores / reference.softcap).tanh()
            seen |= dict(zip(chunk, scores.softmax(-1).sum((0, 1)).tolist(), strict=True))
    kept = torch.tensor(row.kept[g])[reference.sinks : len(row.kept[g]) - reference.recent]
    attention = torch.tensor([seen[p] for p in kept.tolist()]).double() * row.values[g, kept].double().norm(dim=-1)
    keys = turned(row.keys[g, kept].double(), -kept)
    directions = torch.randn(
        len(row.kept), keys.shape[-1], 48, generator=torch.Generator().manual_seed(reference.layer)
    )
    keys = (keys - keys.mean(0)) @ directions[g].double()
    products = keys.T @ keys
    inverse = (products + 1e-4 * products.diagonal().diag()).inverse()
    return attention, (keys @ inverse * keys).sum(-1)


SCORES = {
    "kvzip": kvzip,
    "compactor": compactor,
    "qh2o": h2o,
    "random": random,
    "lazy": lazy,
    "expected": expected,
    "knorm": knorm,
    "keydiff": keydiff,
    "h2o": h2o,
    "tova": tova,
    "snapkv": snapkv,
}
LOOKING = {"kvzip", "compactor", "qh2o", "h2o", "lazy", "expected"}
