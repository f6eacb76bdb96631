"""The calls of a layer's cache: made as at serving in the forward pass, and noted; repeated in the backward pass.

Letters: B rows, N tokens of all rows one after the other, T tokens of a chunk, G key/value heads, D head size, n slots in use.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn

from litgpt.kernels.row_attention import attend_rows, can_attend_rows
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache.plan import Plan
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.score import Found, ScoreKVCache
from litgpt.kvcache.storages.default import DefaultStorage
from litgpt.train.chunks import Chunk
from litgpt.train.kept_inputs import Kept, keep


@dataclass(frozen=True)
class Call:
    """A call of a layer's cache with some `tokens` of a chunk: `sizes[i]` of row `rows[i]`, which has `starts[i]` already. And
    what it finds there: the numbers of the cache's rows, and the places of the tokens in its slots, (B, G, n), or (B, 1, n) if
    they are those of all heads."""

    tokens: torch.Tensor | slice
    starts: list[int]
    sizes: list[int]
    rows: list[int]
    fields: tuple[tuple[int, ...], ...]
    places: torch.Tensor


class Log:
    """The calls of a layer's cache in all chunks. Their places are put away as the inputs of layers are."""

    def __init__(self, chunks: list[list[Call]], place: str) -> None:
        self._chunks, end = [], 0
        for calls in chunks:
            self._chunks.append([])
            for call in calls:
                begin, end = end, end + call.places.numel()
                without = replace(call, places=call.places.new_empty(0))
                self._chunks[-1].append((without, call.places.shape, (begin, end)))
        flat = [call.places.reshape(-1).int() for calls in chunks for call in calls]
        self._places: Kept = keep(torch.cat(flat), place)

    def calls(self, index: int) -> list[Call]:
        """Those of a chunk."""
        chunk = self._chunks[index]
        return [replace(call, places=self._places.rows([span]).view(shape).long()) for call, shape, span in chunk]


class Plans(Protocol):
    """What the layers of a pass share."""

    def plan(self, cache: PlannedKVCache, starts: list[int], sizes: list[int], rows: list[int]) -> Plan: ...

    def places(self, positions: torch.Tensor) -> torch.Tensor: ...


class StandIn(nn.Module):
    """Stands for a layer's cache during a chunk: calls the cache with one part of its tokens after the other."""

    def __init__(self, cache: PlannedKVCache, chunk: Chunk, plans: Plans) -> None:
        super().__init__()
        self.cache, self.chunk, self.plans = cache, chunk, plans

    @abstractmethod
    def _prepared(
        self, key: torch.Tensor, value: torch.Tensor, sink_logits: torch.Tensor | None
    ) -> Iterator[tuple[Call, Plan]]:
        """Calls, for each of which the cache is ready when it comes, with their plans."""

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        outputs, parts = [], []
        for call, own_plan in self._prepared(key, value, sink_logits):
            own = (x[:, :, call.tokens] for x in (query, key, value))
            outputs.append(self.cache.run(own_plan, *own, None, sink_logits))
            parts.append(call.tokens)
        return _in_order(outputs, parts)


class Serving(StandIn):
    """Calls a cache as at serving, and notes the calls.

    A call ends where the cache evicts: how a sequence is cut into calls changes no output after the first one.
    """

    def __init__(self, cache: PlannedKVCache, chunk: Chunk, plans: Plans) -> None:
        super().__init__(cache, chunk, plans)
        self.calls: list[Call] = []

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(self.cache, ScoreKVCache):
            noted = self.cache.run_noted(query, key, value, sink_logits)
            if noted is not None:
                return self._noted(*noted)
        return super().run(plan, query, key, value, token_idx, sink_logits)

    def _noted(self, output: torch.Tensor, steps: list[Found]) -> torch.Tensor:
        """Note the calls that the cache has made as steps of one."""
        begin = 0
        for size, fields, positions in steps:
            tokens, starts = slice(begin, begin + size), [self.chunk.starts[0] + begin]
            places = self.plans.places(positions)
            self.calls.append(Call(tokens, starts, [size], self.chunk.rows, fields, places))
            begin += size
        return output

    def _prepared(
        self, key: torch.Tensor, value: torch.Tensor, sink_logits: torch.Tensor | None
    ) -> Iterator[tuple[Call, Plan]]:
        cache, chunk = self.cache, self.chunk
        done = [0] * len(chunk.rows)
        begins = [0, *accumulate(chunk.sizes)]
        while members := [i for i, size in enumerate(chunk.sizes) if done[i] < size]:
            rows, starts = [chunk.rows[i] for i in members], [chunk.starts[i] + done[i] for i in members]
            sizes = []
            for i in members:
                left, limit = chunk.sizes[i] - done[i], cache.uninterrupted_tokens(chunk.rows[i])
                sizes.append(left if limit is None else min(left, limit))
            spans = [(begins[i] + done[i], begins[i] + done[i] + n) for i, n in zip(members, sizes, strict=True)]
            if len(spans) == 1 or sizes == chunk.sizes:
                tokens: torch.Tensor | slice = slice(spans[0][0], spans[-1][1])
            else:
                tokens = torch.cat([torch.arange(*span, device=key.device) for span in spans])
            plan = cache.prepare(self.plans.plan(cache, starts, sizes, rows), sink_logits)
            positions = cache.token_positions()
            if positions.stride(1) == 0:  # those of all heads are the same
                positions = positions[:, :1]
            self.calls.append(Call(tokens, starts, sizes, rows, cache.row_fields, self.plans.places(positions)))
            yield self.calls[-1], plan
            cache.commit(plan)
            for i, n in zip(members, sizes, strict=True):
                done[i] += n


class Again(StandIn):
    """Repeats the calls of a chunk, with a cache that is refilled before each of them.

    `stored` are the keys and values (B, G, n, D) that the first call found, `n_tokens` is N.
    """

    def __init__(self, *parts: Any, calls: list[Call], stored: list[torch.Tensor], n_tokens: int) -> None:
        super().__init__(*parts)
        self.calls, self.stored, self.n_tokens = calls, stored, n_tokens

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.query = query
        one_row = len(self.chunk.rows) == len(self.calls[0].places) == 1
        if not one_row or len(self.calls) == 1 or type(self.cache.storage) is not DefaultStorage:
            return super().run(plan, query, key, value, token_idx, sink_logits)
        self.key, self.value = key, value
        own = [torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip(self.stored, (key, value), strict=True)]
        query, *own = (x.to(self.cache.dtype) for x in (query, *own))
        G, T, mha = key.shape[1], query.shape[2], self.cache.mha
        sees = self._sees(T)
        plain = sink_logits is None and mha.has_plain_scores() and query.dtype == torch.float32
        if plain and can_attend_rows(query, *own):
            return attend_rows(query, *own, [T], mha.scale, mask=sees[0]).to(key.dtype)
        bias = torch.zeros(sees.shape, dtype=query.dtype, device=query.device).masked_fill_(~sees, -torch.inf)
        if sink_logits is None:  # heads that share keys share a mask, as those of a row do
            by_group = DefaultKeysAndValues(*(x.transpose(0, 1) for x in own))
            bias = bias.transpose(0, 1)
            output, _ = mha.attend(query.unflatten(1, (G, -1))[0], by_group, bias, False)
            output = output.flatten(0, 1)[None]
        else:
            bias = bias.repeat_interleave(query.shape[1] // bias.shape[1], dim=1)
            output, _ = mha.attend(query, DefaultKeysAndValues(*own), bias, False, sink_logits=sink_logits)
        return output.transpose(1, 2).flatten(2).to(key.dtype)

    def _sees(self, T: int) -> torch.Tensor:
        """Whether the chunk's tokens see what the first call found and, after it, themselves: (1, G or 1, T, n + T)."""
        device = self.calls[0].places.device
        S, (_, G, n) = len(self.calls), self.calls[0].places.shape
        by_token = torch.repeat_interleave(torch.tensor([call.sizes[0] for call in self.calls])).to(device)
        by_slot = torch.repeat_interleave(torch.tensor([call.places.shape[2] for call in self.calls])).to(device)
        found = self._index.gather(2, torch.cat([call.places for call in self.calls], dim=2)) + by_slot * (n + T)
        sees = torch.zeros(1, G, S * (n + T), dtype=torch.bool, device=device).scatter_(2, found, True)
        sees = sees.view(1, G, S, n + T)[:, :, by_token]
        sees[..., n:] |= (by_token[:, None] == by_token).tril()
        return sees

    def _prepared(
        self, key: torch.Tensor, value: torch.Tensor, sink_logits: torch.Tensor | None
    ) -> Iterator[tuple[Call, Plan]]:
        self.key, self.value = key, value
        for i, call in enumerate(self.calls):
            stored = self.stored
            if i > 0:  # some tokens of the chunk are among those stored, and some others have left
                index = self._index.gather(2, call.places).unsqueeze(-1)
                stored = [
                    torch.cat((old, new.expand(len(old), -1, -1, -1)), dim=2).gather(
                        2, index.expand(-1, old.shape[1], -1, old.shape[-1])
                    )
                    for old, new in zip(stored, (key, value), strict=True)
                ]
            self.cache.refill(call.fields, *stored)
            yield call, self.plans.plan(self.cache, call.starts, call.sizes, call.rows)

    @cached_property
    def _index(self) -> torch.Tensor:
        """By place (B, G, N): where a token is among those that the first call found and, after them, those of the chunk."""
        places, tokens = self.calls[0].places, self.chunk.tokens
        B, G, n = places.shape
        index = places.new_zeros(B, G, self.n_tokens)
        index.scatter_(2, places, torch.arange(n, device=places.device).expand(B, G, n))
        index[:, :, tokens] = n + torch.arange(sum(self.chunk.sizes), device=places.device)
        return index


class KeysAndValuesOnly(nn.Module):
    """Stands for a cache and notes the keys and values that it is given."""

    def run(self, plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.key, self.value = key, value
        raise FoundError


class FoundError(Exception):
    """Ends the run of an attention layer of which only keys and values are wanted."""


def _in_order(outputs: list[torch.Tensor], parts: list[torch.Tensor | slice]) -> torch.Tensor:
    """Outputs (1, T_i, H * D) of parts of a chunk's tokens as one, in the order of these tokens."""
    if len(outputs) == 1:
        return outputs[0]
    if all(isinstance(part, slice) for part in parts):
        return torch.cat(outputs, dim=1)
    device = outputs[0].device
    places = [torch.arange(part.start, part.stop, device=device) if isinstance(part, slice) else part for part in parts]
    return torch.cat(outputs, dim=1)[:, torch.cat(places).argsort()]
