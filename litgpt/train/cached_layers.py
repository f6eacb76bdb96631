"""Training through key-value caches: every layer sees what its cache would have kept.

With teacher forcing a layer needs the outputs of the one below for all tokens, and its own cache. So each layer runs over the
whole sequences chunk by chunk, with the cache, the plans and the evictions of serving, before the next one does. Of a layer
only its inputs are kept for the backward pass, and for every chunk the positions in the cache. The backward pass takes the
chunks last to first: the stored keys and values are put back into the slots that they had, as leaves of a graph of this chunk
alone, and what flows into them is added to the gradients of the tokens that they came from.

Letters: B rows, N tokens of all rows one after the other, E embedding size, G key/value heads, D head size, n slots in use.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from litgpt.kvcache import CacheSpec
from litgpt.kvcache.plan import Plan
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.model import GPT
from litgpt.rope import Rope


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

    Raises:
        ValueError: if caches of that kind cannot be trained through.
    """

    def __init__(self, gpt: GPT, spec: CacheSpec, chunk: int) -> None:
        if chunk < 1:
            raise ValueError(f"a chunk needs at least one token, got {chunk}")
        self.gpt, self.spec, self.chunk = gpt, spec, chunk

    def __call__(self, idx: torch.Tensor, row_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Final-norm outputs (B, T, E), or (1, N, E) with `row_sizes`, of tokens of the same shape."""
        B, T = idx.shape
        sizes = [T] * B if row_sizes is None else list(row_sizes)
        sweep = _Sweep(self, idx.reshape(1, -1), sizes)
        x = self.gpt.embed(sweep.idx)
        for block_idx, block in enumerate(self.gpt.transformer.h):
            params = [p for p in block.parameters() if p.requires_grad]
            x = _CachedLayer.apply(x, sweep, block_idx, *params)
        return self.gpt.transformer.ln_f(x).view(B, T, -1)


class _Sweep:
    """What all layers of one call share: chunks, rotations, plans, seeds."""

    def __init__(self, layers: CachedLayers, idx: torch.Tensor, row_sizes: list[int]) -> None:
        self.layers, self.gpt, self.idx, self.row_sizes = layers, layers.gpt, idx, row_sizes
        longest = max(row_sizes)
        self.cache_length = layers.spec.cache_length or layers.spec.policy_class.default_cache_length(self.gpt.config)
        if not layers.spec.evicts and layers.spec.cache_length is None:
            self.cache_length = longest
        self.chunks = chunks_of(row_sizes, layers.chunk, idx.device)
        self.begins = torch.tensor([0, *accumulate(row_sizes)][:-1], device=idx.device)
        self.packed = len(row_sizes) > 1
        self._long = self.gpt.needs_long_rope(longest)
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

    def plan(self, cache: PlannedKVCache, index: int) -> Plan:
        """The plan of chunk `index`, the same for all layers with equal caches."""
        chunk, key = self.chunks[index], (index, cache.plan_key())
        if key not in self._plans:
            T = chunk.sizes if self.packed else chunk.sizes[0]
            self._plans[key] = cache.plan(chunk.starts[0], len(chunk.rows), T, chunk.rows if self.packed else None)
        return self._plans[key]

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Places among the tokens of all rows of `positions` (B, G, n); empty slots get that of a row's first token."""
        return positions.clamp(min=0) + self.begins[:, None, None]


@dataclass(frozen=True)
class _Entry:
    """What a chunk found in its layer's cache."""

    plan: Plan
    fields: tuple[tuple[int, ...], ...]
    places: torch.Tensor  # (B, G, n)


class _CachedLayer(torch.autograd.Function):
    """One layer over the whole sequences: (1, N, E) to (1, N, E)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sweep: _Sweep, block_idx: int, *params: torch.Tensor) -> torch.Tensor:
        block, cache = sweep.gpt.transformer.h[block_idx], sweep.make_cache(block_idx)
        output, log = torch.empty_like(x), []
        seed = int(torch.randint(2**62, ())) if block.training else None
        sinks = getattr(block.attn, "sinks", None)
        for index, chunk in enumerate(sweep.chunks):
            plan = cache.prepare(sweep.plan(cache, index), sinks)
            log.append(_Entry(plan, cache.row_fields, sweep.places(cache.token_positions())))
            with _cache_of(block, cache), _seeded(seed, index):
                output[:, chunk.tokens] = block(
                    x[:, chunk.tokens], sweep.ropes[index], plan, sweep.idx[:, chunk.tokens]
                )
            cache.commit(plan)
        ctx.save_for_backward(x)
        ctx.sweep, ctx.block, ctx.cache, ctx.log, ctx.seed, ctx.params = sweep, block, cache, log, seed, params
        return output

    @staticmethod
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        sweep, block, cache, params = ctx.sweep, ctx.block, ctx.cache, ctx.params
        keys, values = _keys_and_values(sweep, block, x, ctx.seed)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        d_x, d_params = torch.empty_like(x), [None] * len(params)
        for index in reversed(range(len(sweep.chunks))):
            chunk, entry = sweep.chunks[index], ctx.log[index]
            stored = [_gathered(of_all, entry.places).requires_grad_() for of_all in (keys, values)]
            own, recorder = x[:, chunk.tokens].detach().requires_grad_(), _Recorder(cache)
            with torch.enable_grad():
                cache.refill(entry.fields, *stored)
                with _cache_of(block, recorder), _seeded(ctx.seed, index):
                    y = block(own, sweep.ropes[index], entry.plan, sweep.idx[:, chunk.tokens])
            outputs, gradients = [y], [d_output[:, chunk.tokens]]
            for new, d_all in ((recorder.key, d_keys), (recorder.value, d_values)):
                if new.requires_grad:
                    outputs.append(new)
                    gradients.append(d_all[:, :, chunk.tokens])
            inputs = [own, *stored, *params]
            found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
            d_x[:, chunk.tokens] = found[0]
            for d_all, d_stored in ((d_keys, found[1]), (d_values, found[2])):
                if d_stored is not None:
                    _add_gathered(d_all, entry.places, d_stored)
            for i, d_param in enumerate(found[3:]):
                if d_param is not None:
                    d_params[i] = d_param if d_params[i] is None else d_params[i].add_(d_param)
        cache.clear()
        cache.storage.detach_graph()
        return d_x, None, None, *d_params


class _Recorder(nn.Module):
    """Stands for a cache and notes the keys and values that it is given."""

    def __init__(self, cache: PlannedKVCache | None) -> None:
        super().__init__()
        self.cache = cache

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
        if self.cache is None:  # only keys and values are wanted
            B, H, T, _ = query.shape
            return query.new_zeros(B, T, H * value.shape[-1])
        return self.cache.run(plan, query, key, value, token_idx, sink_logits)


@torch.no_grad()
def _keys_and_values(
    sweep: _Sweep, block: nn.Module, x: torch.Tensor, seed: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (1, G, N, D) of all tokens in a layer."""
    keys = values = None
    for index, chunk in enumerate(sweep.chunks):
        recorder = _Recorder(None)
        with _cache_of(block, recorder), _seeded(seed, index):
            block.attn(block.norm_1(x[:, chunk.tokens]), sweep.ropes[index], _NO_PLAN, sweep.idx[:, chunk.tokens])
        if keys is None:
            N = x.shape[1]
            keys, values = (of.new_empty(1, of.shape[1], N, of.shape[3]) for of in (recorder.key, recorder.value))
        keys[:, :, chunk.tokens], values[:, :, chunk.tokens] = recorder.key, recorder.value
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
