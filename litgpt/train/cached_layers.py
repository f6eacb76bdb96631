"""Training through key-value caches: every layer sees what its cache would have kept.

With teacher forcing a layer needs the outputs of the one below for all tokens, and its own cache. So each layer runs over the
whole sequences chunk by chunk, with the cache, the plans and the evictions of serving, before the next one does. Of a layer
only its inputs are kept for the backward pass, and for every chunk the positions in the cache. The backward pass takes the
chunks last to first: the stored keys and values are put back into the slots that they had, as leaves of a graph of this chunk
alone, and what flows into them is added to the gradients of the tokens that they came from.

Letters: B rows, N tokens of all rows one after the other, E embedding size, G key/value heads, D head size, n slots in use.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.kvcache import CacheSpec
from litgpt.kvcache.plan import Plan
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.model import GPT, Block, GptNeoxMLP, LLaMAMLP, Multiply, Rows
from litgpt.rope import Rope
from litgpt.train.kept_inputs import PLACES, keep
from litgpt.train.products import gradients_only

CHUNKS_AT_ONCE = 4  # of rows that dense caches keep, in a graph of one layer


@dataclass(frozen=True)
class Chunk:
    """Tokens that enter the caches together: `sizes[i]` of row `rows[i]`, whose earlier ones are `starts[i]`.

    `tokens` (T,) are their places among those of all rows.
    """

    rows: list[int]
    starts: list[int]
    sizes: list[int]
    tokens: torch.Tensor


def chunks_of(row_sizes: Sequence[int], size: int, device: torch.device) -> list[Chunk]:
    """Rows of these sizes, cut into chunks of `size` tokens a row."""
    begins = [0, *accumulate(row_sizes)]
    chunks = []
    for start in range(0, max(row_sizes), size):
        rows = [row for row, total in enumerate(row_sizes) if total > start]
        sizes = [min(size, row_sizes[row] - start) for row in rows]
        places = [
            torch.arange(begins[row] + start, begins[row] + start + n) for row, n in zip(rows, sizes, strict=True)
        ]
        chunks.append(Chunk(rows, [start] * len(rows), sizes, torch.cat(places).to(device)))
    return chunks


class CachedLayers:
    """Runs the layers of a model over whole sequences through caches; differentiable.

    Args:
        gpt: the model.
        spec: the caches. They have to be planned ones, as all that this package registers are.
        chunk: tokens of a row that enter the caches together.
        keep_inputs: where the inputs of layers stay until the backward pass: device (with the model), cpu, or disk (in
            temporary files).

    Raises:
        ValueError: if caches of that kind cannot be trained through.
    """

    def __init__(self, gpt: GPT, spec: CacheSpec, chunk: int, keep_inputs: str = "device") -> None:
        if chunk < 1:
            raise ValueError(f"a chunk needs at least one token, got {chunk}")
        if keep_inputs not in PLACES:
            raise ValueError(f"keep_inputs must be {', '.join(PLACES)}, got {keep_inputs!r}")
        self.gpt, self.spec, self.chunk, self.keep_inputs = gpt, spec, chunk, keep_inputs
        self.cache_length = spec.length_for(gpt.config)

    def __call__(self, idx: torch.Tensor, row_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Final-norm outputs (B, T, E), or (1, N, E) with `row_sizes`, of tokens of the same shape."""
        B, T = idx.shape
        sizes = [T] * B if row_sizes is None else list(row_sizes)
        if self._nothing_to_cut(sizes):
            return self._whole(idx.reshape(1, -1), sizes).view(B, T, -1)
        sweep = _Sweep(self, idx.reshape(1, -1), sizes)
        x = self.gpt.embed(sweep.idx)
        for block_idx, block in enumerate(self.gpt.transformer.h):
            params = [p for p in block.parameters() if p.requires_grad]
            x = _CachedLayer.apply(x, sweep, block_idx, *params)
        return self.gpt.transformer.ln_f(x).view(B, T, -1)

    def _nothing_to_cut(self, sizes: list[int]) -> bool:
        """Whether caches keep all tokens of rows as they are, and a layer's graph of all of them is small."""
        keeps_all = not self.spec.evicts and self.spec.storage == "default"
        room = self.cache_length if self.spec.cache_length is not None else max(sizes)
        small = sum(sizes) <= CHUNKS_AT_ONCE * self.chunk and self.keep_inputs == "device"
        return keeps_all and small and max(sizes) <= room

    def _whole(self, idx: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Outputs (1, N, E) of layers that see all tokens of rows."""
        gpt, longest = self.gpt, max(sizes)
        rope = gpt.rope_rows([0] * len(sizes), sizes, gpt.needs_long_rope(longest))
        rows, x = Rows(tuple(sizes)), gpt.embed(idx)
        for block in gpt.transformer.h:
            x = checkpoint(block, x, rope, rows, idx, use_reentrant=False)
        return gpt.transformer.ln_f(x)


class _Sweep:
    """What all layers of one call share: chunks, rotations, plans, seeds."""

    def __init__(self, layers: CachedLayers, idx: torch.Tensor, row_sizes: list[int]) -> None:
        self.layers, self.gpt, self.idx, self.row_sizes = layers, layers.gpt, idx, row_sizes
        longest = max(row_sizes)
        self.cache_length = layers.cache_length
        if not layers.spec.evicts and layers.spec.cache_length is None:
            self.cache_length = longest
        self.chunks = chunks_of(row_sizes, layers.chunk, idx.device)
        self.begins = torch.tensor([0, *accumulate(row_sizes)][:-1], device=idx.device)
        self.packed = len(row_sizes) > 1
        self._long = self.gpt.needs_long_rope(longest)
        self.differentiated = torch.is_grad_enabled()
        self._plans: dict[tuple, Plan] = {}

    @cached_property
    def ropes(self) -> list[list[Rope]]:
        """Rotations of every chunk's tokens."""
        return [
            self.gpt.rope_rows(chunk.starts, chunk.sizes, self._long)
            if self.packed
            else self.gpt.rope_rows(chunk.starts[0], chunk.sizes[0], self._long)
            for chunk in self.chunks
        ]

    def run(self, block: nn.Module, index: int, x: torch.Tensor, cache: nn.Module, seed: int | None) -> torch.Tensor:
        """Outputs of a layer for the inputs of chunk `index`, with what stands for its cache."""
        with _cache_of(block, cache), _seeded(seed, index):
            return block(x, self.ropes[index], _NO_PLAN, self.idx[:, self.chunks[index].tokens])

    def make_cache(self, block_idx: int) -> PlannedKVCache:
        """An empty cache for a layer."""
        gpt = self.gpt
        cache = self.layers.spec.create_layer(
            gpt.config,
            len(self.row_sizes),
            block_idx,
            self.cache_length,
            gpt.layer_device(block_idx),
            gpt.dtype,
            mha=gpt.mha,
        )
        if not isinstance(cache, PlannedKVCache):
            raise ValueError(f"a {type(cache).__name__} cannot be trained through: its calls are not planned")
        cache.start(len(self.row_sizes))
        return cache

    def plan(self, cache: PlannedKVCache, starts: list[int], sizes: list[int], rows: list[int]) -> Plan:
        """The plan of a call, the same for all layers with equal caches."""
        key = (*sizes, *rows, cache.plan_key())
        if key not in self._plans:
            T = sizes if self.packed else sizes[0]
            self._plans[key] = cache.plan(max(starts), len(rows), T, rows if self.packed else None)
        return self._plans[key]

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Places among the tokens of all rows of `positions` (B, G, n); empty slots get that of a row's first token."""
        return positions.clamp(min=0) + self.begins[:, None, None]


@dataclass(frozen=True)
class _Call:
    """A call of a layer's cache with some tokens of a chunk, and what it finds there: the numbers of the cache's rows, and the
    places of the tokens in its slots (B, G, n)."""

    tokens: torch.Tensor | slice
    plan: Plan
    fields: tuple[tuple[int, ...], ...]
    places: torch.Tensor


class _CachedLayer(torch.autograd.Function):
    """One layer over the whole sequences: (1, N, E) to (1, N, E)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sweep: _Sweep, block_idx: int, *params: torch.Tensor) -> torch.Tensor:
        block, cache = sweep.gpt.transformer.h[block_idx], sweep.make_cache(block_idx)
        output, log = torch.empty_like(x), []
        seed = int(torch.randint(2**62, ())) if block.training else None
        for index, chunk in enumerate(sweep.chunks):
            serving = _Serving(sweep, chunk, cache)
            output[:, chunk.tokens] = sweep.run(block, index, x[:, chunk.tokens], serving, seed)
            log.append(serving.calls)
        cache.clear()
        ctx.kept = keep(x, sweep.layers.keep_inputs) if sweep.differentiated else None
        ctx.autocast = _autocast_of(x.device.type)
        ctx.sweep, ctx.block, ctx.cache, ctx.log, ctx.seed, ctx.params = sweep, block, cache, log, seed, params
        return output

    @staticmethod
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError("the gradients of this pass through caches have been taken already: compute it anew")
        x, ctx.kept = ctx.kept(), None
        sweep, block, cache, params = ctx.sweep, ctx.block, ctx.cache, ctx.params
        with torch.autocast(**ctx.autocast):  # the backward pass leaves it
            keys, values = _keys_and_values(sweep, block, x, ctx.seed)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        d_x, d_params = torch.empty_like(x), [None] * len(params)
        for index in reversed(range(len(sweep.chunks))):
            chunk, calls = sweep.chunks[index], ctx.log[index]
            stored = [_gathered(of_all, calls[0].places).requires_grad_() for of_all in (keys, values)]
            own, again = x[:, chunk.tokens].detach().requires_grad_(), _Again(cache, chunk, calls, stored, x.shape[1])
            with torch.enable_grad(), torch.autocast(**ctx.autocast), _without_outputs(block):
                y = sweep.run(block, index, own, again, ctx.seed)
            outputs, gradients = [y], [d_output[:, chunk.tokens]]
            for new, d_all in ((again.key, d_keys), (again.value, d_values)):
                if new.requires_grad:
                    outputs.append(new)
                    gradients.append(d_all[:, :, chunk.tokens])
            found = torch.autograd.grad(outputs, [own, *stored, *params], gradients, allow_unused=True)
            d_x[:, chunk.tokens] = found[0]
            for d_all, d_stored in ((d_keys, found[1]), (d_values, found[2])):
                if d_stored is not None:
                    _add_gathered(d_all, calls[0].places, d_stored)
            for i, d_param in enumerate(found[3:]):
                if d_param is not None:
                    d_params[i] = d_param if d_params[i] is None else d_params[i].add_(d_param)
        cache.clear()
        cache.storage.detach_graph()
        return d_x, None, None, *d_params


class _Serving(nn.Module):
    """Stands for a cache during a chunk: runs it as at serving, and notes the calls.

    A call ends where the cache evicts: how a sequence is cut into calls changes no output after the first one.
    """

    def __init__(self, sweep: _Sweep, chunk: Chunk, cache: PlannedKVCache) -> None:
        super().__init__()
        self.sweep, self.chunk, self.cache = sweep, chunk, cache
        self.calls: list[_Call] = []

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cache, chunk, outputs = self.cache, self.chunk, []
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
                tokens = torch.cat([torch.arange(*span, device=query.device) for span in spans])
            plan = cache.prepare(self.sweep.plan(cache, starts, sizes, rows), sink_logits)
            self.calls.append(_Call(tokens, plan, cache.row_fields, self.sweep.places(cache.token_positions())))
            outputs.append(cache.run(plan, *(x[:, :, tokens] for x in (query, key, value)), None, sink_logits))
            cache.commit(plan)
            for i, n in zip(members, sizes, strict=True):
                done[i] += n
        return _in_order(outputs, self.calls)


class _Again(nn.Module):
    """Stands for a cache in the backward pass of a chunk: repeats its calls, in a cache that is refilled before each of them.

    Args:
        cache: any contents are lost.
        chunk, calls: as they were in the forward pass.
        stored: keys and values (B, G, n, D) that the first call found.
        n_tokens: N.
    """

    def __init__(
        self, cache: PlannedKVCache, chunk: Chunk, calls: list[_Call], stored: list[torch.Tensor], n_tokens: int
    ) -> None:
        super().__init__()
        self.cache, self.chunk, self.calls, self.stored, self.n_tokens = cache, chunk, calls, stored, n_tokens

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.key, self.value = key, value
        outputs = []
        for i, call in enumerate(self.calls):
            stored = self.stored
            if i > 0:  # some tokens of the chunk are among those stored, and some others have left
                index = self._index.gather(2, call.places)
                stored = [
                    torch.cat((old, new.expand(len(old), -1, -1, -1)), dim=2).gather(
                        2, index.unsqueeze(-1).expand(-1, -1, -1, old.shape[-1])
                    )
                    for old, new in zip(stored, (key, value), strict=True)
                ]
            self.cache.refill(call.fields, *stored)
            own = [x[:, :, call.tokens] for x in (query, key, value)]
            outputs.append(self.cache.run(call.plan, *own, None, sink_logits))
        return _in_order(outputs, self.calls)

    @cached_property
    def _index(self) -> torch.Tensor:
        """By place (B, G, N): where a token is among those that the first call found and, after them, those of the chunk."""
        places, tokens = self.calls[0].places, self.chunk.tokens
        B, G, n = places.shape
        index = places.new_zeros(B, G, self.n_tokens)
        index.scatter_(2, places, torch.arange(n, device=places.device).expand(B, G, n))
        index[:, :, tokens] = n + torch.arange(len(tokens), device=places.device)
        return index


class _KeysAndValuesOnly(nn.Module):
    """Stands for a cache and notes the keys and values that it is given."""

    def run(self, plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.key, self.value = key, value
        raise _FoundError


class _FoundError(Exception):
    """Ends the run of an attention layer of which only keys and values are wanted."""


def _in_order(outputs: list[torch.Tensor], calls: list[_Call]) -> torch.Tensor:
    """Outputs of calls (1, T_i, H * D) as one, in the order of the chunk's tokens."""
    if len(outputs) == 1:
        return outputs[0]
    if all(isinstance(call.tokens, slice) for call in calls):
        return torch.cat(outputs, dim=1)
    tokens = torch.cat(
        [
            torch.arange(c.tokens.start, c.tokens.stop, device=outputs[0].device)
            if isinstance(c.tokens, slice)
            else c.tokens
            for c in calls
        ]
    )
    return torch.cat(outputs, dim=1)[:, tokens.argsort()]


@torch.no_grad()
def _keys_and_values(
    sweep: _Sweep, block: nn.Module, x: torch.Tensor, seed: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (1, G, N, D) of all tokens in a layer."""
    keys = values = None
    for index, chunk in enumerate(sweep.chunks):
        only = _KeysAndValuesOnly()
        with _cache_of(block, only), _seeded(seed, index), suppress(_FoundError):
            block.attn(block.norm_1(x[:, chunk.tokens]), sweep.ropes[index], _NO_PLAN, sweep.idx[:, chunk.tokens])
        if keys is None:
            keys, values = (of.new_empty(1, of.shape[1], x.shape[1], of.shape[3]) for of in (only.key, only.value))
        keys[:, :, chunk.tokens], values[:, :, chunk.tokens] = only.key, only.value
    return keys, values


_NO_PLAN = Plan([], (), ())


def _gathered(of_all: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(B, G, n, D) of (1, G, N, D) at `places` (B, G, n)."""
    index = places.unsqueeze(-1).expand(-1, -1, -1, of_all.shape[-1])
    return of_all.expand(len(places), -1, -1, -1).gather(2, index)


def _add_gathered(of_all: torch.Tensor, places: torch.Tensor, added: torch.Tensor) -> None:
    """Add (B, G, n, D) to (1, G, N, D) at `places` (B, G, n), which may repeat."""
    flat = places.transpose(0, 1).flatten(1).unsqueeze(-1).expand(-1, -1, of_all.shape[-1])
    of_all[0].scatter_add_(1, flat, added.transpose(0, 1).flatten(1, 2).to(of_all.dtype))


def _autocast_of(device: str) -> dict[str, Any]:
    """Arguments of the `torch.autocast` that is in force."""
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "enabled": enabled, "dtype": torch.get_autocast_dtype(device) if enabled else None}


def _without_outputs(block: Block) -> AbstractContextManager[None]:
    """Spare the last product of a layer, whose outputs a backward pass does not need, if nothing but a factor follows it."""
    last = getattr(block.mlp, "proj", None)
    spared = isinstance(block.mlp, GptNeoxMLP | LLaMAMLP) and type(last) is nn.Linear
    spared = spared and isinstance(block.post_mlp_norm, nn.Identity | Multiply)
    spared = spared and not torch.is_autocast_enabled(last.weight.device.type)
    return gradients_only(last) if spared else nullcontext()


@contextmanager
def _cache_of(block: nn.Module, cache: nn.Module) -> Iterator[None]:
    """Let the attention of a layer use `cache`."""
    before, block.attn.kv_cache = block.attn.kv_cache, cache
    try:
        yield
    finally:
        block.attn.kv_cache = before


@contextmanager
def _seeded(seed: int | None, index: int) -> Iterator[None]:
    """Draw the random numbers of a chunk, the same in every pass (None: nothing is drawn)."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed((seed + index) % 2**63)
        yield
