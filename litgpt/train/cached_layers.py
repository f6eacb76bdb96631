"""Training through key-value caches: every layer sees what its cache would have kept.

With teacher forcing a layer needs the outputs of the one below for all tokens, and its own cache. So each layer runs over the
whole sequences chunk by chunk, with the cache, the plans and the evictions of serving, before the next one does. Of a layer
only its inputs are kept for the backward pass, and for every chunk the positions in the cache; or the inputs of every k-th
layer, from which the others run again. The backward pass takes the chunks last to first: the stored keys and values are put
back into the slots that they had, as leaves of a graph of this chunk alone, and what flows into them is added to the gradients
of the tokens that they came from.

Letters: B rows, N tokens of all rows one after the other, E embedding size, G key/value heads, D head size, n slots in use.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from litgpt.kernels.row_attention import Seen
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.plan import Plan
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.policies import PositionalPolicy
from litgpt.kvcache.positional import seen_by_position
from litgpt.kvcache.score import ScoreKVCache
from litgpt.model import GPT, Block
from litgpt.rope import Rope
from litgpt.train.by_position import Attended, ByPosition, spans_before
from litgpt.train.cache_calls import Again, FoundError, KeysAndValuesOnly, Log, Serving
from litgpt.train.chunks import chunks_of
from litgpt.train.gradients_only import gradients_only
from litgpt.train.keep_loss import KeepLoss, LayerKeepLoss, exact
from litgpt.train.kept_inputs import PLACES, Kept, keep
from litgpt.train.replaced_forward import replaced_forward
from litgpt.train.stored_tokens import StoredTokens

PLANNED_NUMBERS = 4 << 20  # in the masks of plans that layers share; other plans are made for every layer
CHUNKS_AT_ONCE = 4  # in a graph of one layer, where no layer has a cache


def check_trainable(spec: CacheSpec) -> None:
    """Raise `ValueError` for caches that cannot be trained through layer by layer."""
    if getattr(spec.policy_class, "reads_twice", False):
        raise ValueError(
            f"{spec.policy} cannot be trained through: it reads a text a second time, with all layers, before tokens go; "
            "train through another policy, such as h2o or snapkv"
        )


class CachedLayers:
    """Runs the layers of a model over whole sequences through caches; differentiable.

    Args:
        gpt: the model.
        spec: the caches: planned ones, as all that this package registers are; `ValueError` if `check_trainable` refuses them.
        chunk: tokens of a row that enter the caches together.
        keep_inputs: where the inputs of layers stay until the backward pass: device (with the model), cpu, or disk (in
            temporary files); or a number k: on the device those of every k-th layer, and the others run again.
        first_chunk: tokens of a row in the first chunk (None: as many as in the others).
    """

    def __init__(
        self,
        gpt: GPT,
        spec: CacheSpec,
        chunk: int,
        keep_inputs: str | int = "device",
        first_chunk: int | None = None,
    ) -> None:
        self.first_chunk = chunk if first_chunk is None else first_chunk
        if min(chunk, self.first_chunk) < 1:
            raise ValueError(f"a chunk needs at least one token, got {min(chunk, self.first_chunk)}")
        self.every, self.place = (keep_inputs, "device") if isinstance(keep_inputs, int) else (1, keep_inputs)
        if self.every < 1 or self.place not in PLACES:
            raise ValueError(f"keep_inputs must be {', '.join(PLACES)} or a number of layers, got {keep_inputs!r}")
        check_trainable(spec)
        self.gpt, self.spec, self.chunk, self.keep_inputs = gpt, spec, chunk, keep_inputs
        self.cache_length = spec.length_for(gpt.config)
        spec.layer_lengths(gpt.config, self.cache_length)  # refuses impossible budgets before any work

    def are_few(self, n_tokens: int) -> bool:
        """Whether memory for them is no matter: all of them run together where no layer has a cache."""
        return n_tokens <= CHUNKS_AT_ONCE * self.chunk

    def __call__(self, idx: torch.Tensor, row_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Final-norm outputs (B, T, E), or (1, N, E) with `row_sizes`, of tokens of the same shape."""
        return self.gpt.transformer.ln_f(self.last_outputs(idx, row_sizes))

    def last_outputs(
        self, idx: torch.Tensor, row_sizes: Sequence[int] | None = None, keep_loss: KeepLoss | None = None
    ) -> torch.Tensor:
        """Outputs of the last layer, which the final norm comes after. `keep_loss` gets terms of all layers."""
        B, T = idx.shape
        sizes = [T] * B if row_sizes is None else list(row_sizes)
        sweep = _Sweep(self, idx.reshape(1, -1), sizes, keep_loss)
        x, n = self.gpt.embed(sweep.idx), len(self.gpt.transformer.h)
        if self.every > 1 and any(isinstance(block, FSDPModule) for block in self.gpt.transformer.h):
            raise ValueError("keep_inputs must be a place where layers are divided among processes, not a number")
        for first in range(0, n, self.every):
            x = sweep.run_group(range(first, min(first + self.every, n)), x)
        return x.view(B, T, -1)


class _Sweep:
    """What all layers of one call share: chunks, rotations, plans, seeds."""

    def __init__(
        self, layers: CachedLayers, idx: torch.Tensor, row_sizes: list[int], keep_loss: KeepLoss | None
    ) -> None:
        self.keep_loss = keep_loss
        self.layers, self.gpt, self.idx, self.row_sizes = layers, layers.gpt, idx, row_sizes
        longest = max(row_sizes)
        self.cache_length = layers.cache_length
        if not layers.spec.evicts and layers.spec.cache_length is None:
            self.cache_length = longest
        self.slots = layers.spec.layer_lengths(self.gpt.config, self.cache_length)
        self.seen = [self._seen(i, longest) for i in range(len(self.gpt.transformer.h))]
        chunk, first = layers.chunk, layers.first_chunk
        self.whole = None not in self.seen and layers.are_few(sum(row_sizes)) and layers.keep_inputs == "device"
        if self.whole:
            chunk, first = longest, longest
        self.chunks = chunks_of(row_sizes, chunk, idx.device, first)
        self.begins = torch.tensor([0, *accumulate(row_sizes)][:-1], device=idx.device)
        self.packed = len(row_sizes) > 1
        self._long = self.gpt.needs_long_rope(longest)
        self.differentiated = torch.is_grad_enabled()
        self._plans: dict[tuple, Plan] = {}
        self._numbers = 0

    def _seen(self, block_idx: int, longest: int) -> Seen | None:
        """What tokens of rows of at most `longest` see in a layer, if their positions alone say it and they see it as it is."""
        spec, config = self.layers.spec, self.gpt.config
        policy, window = spec.layer_policy(config, block_idx, self.slots[block_idx]), config.window(block_idx)
        if spec.storage != "default" or not isinstance(policy, PositionalPolicy):
            return None
        first = Seen.within(window)  # a first chunk sees all of itself, whatever stays of it
        if longest <= policy.cache_length:
            return first
        later = seen_by_position(policy, window) if policy.evicts else None  # None: the cache will refuse so many
        return later if later == first or self.layers.first_chunk <= policy.cache_length else None

    @cached_property
    def ropes(self) -> list[list[Rope]]:
        """Rotations of every chunk's tokens."""
        if self.packed:
            return [self.gpt.rope_rows(chunk.starts, chunk.sizes, self._long) for chunk in self.chunks]
        return [self.gpt.rope_rows(chunk.starts[0], chunk.sizes[0], self._long) for chunk in self.chunks]

    def run_group(self, group: range, x: torch.Tensor) -> torch.Tensor:
        """Outputs (1, N, E) of layers for all tokens. A layer that is divided among processes is called once, with all chunks:
        its weights are gathered once in each pass, and its gradients added up among the processes once."""
        blocks = [self.gpt.transformer.h[i] for i in group]

        def run(x: torch.Tensor) -> torch.Tensor:
            params = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
            x, kept = _LayerGroup.apply(x, self, group, [len(of) for of in params], *sum(params, []))
            if self.keep_loss is not None:
                self.keep_loss.terms.append(kept)
            return x

        if not isinstance(blocks[0], FSDPModule):
            return run(x)
        with replaced_forward({blocks[0]: run}):
            return blocks[0](x)

    def run(self, block: nn.Module, index: int, x: torch.Tensor, cache: nn.Module, seed: int | None) -> torch.Tensor:
        """Outputs of a layer for the inputs of chunk `index`, with what stands for its cache."""
        forward = partial(Block.forward, block) if isinstance(block, FSDPModule) else block
        with _cache_of(block, cache), _seeded(seed, index):
            return forward(x, self.ropes[index], _NO_PLAN, self.idx[:, self.chunks[index].tokens])

    def make_cache(self, block_idx: int) -> PlannedKVCache:
        """An empty cache for a layer."""
        gpt = self.gpt
        cache = self.layers.spec.create_layer(
            gpt.config,
            len(self.row_sizes),
            block_idx,
            self.slots[block_idx],
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
        if key in self._plans:
            return self._plans[key]
        T = sizes if self.packed else sizes[0]
        plan = cache.plan(max(starts), len(rows), T, rows if self.packed else None)
        numbers = max(sizes) * (self.cache_length + max(sizes))  # of a mask
        if self._numbers + numbers <= PLANNED_NUMBERS:
            self._plans[key] = plan
            self._numbers += numbers
        return plan

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Places among the tokens of all rows of `positions` (B, G, n); empty slots get that of a row's first token."""
        return positions.clamp(min=0) + self.begins[:, None, None]


class _LayerGroup(torch.autograd.Function):
    """Some layers over the whole sequences, (1, N, E) to (1, N, E), and a zero with the gradients of their keep loss: only the
    inputs of the first one are kept.

    Its gradients overwrite those of its outputs, which nothing else reads: a final norm comes after the last layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sweep: _Sweep, group: range, n_params: list[int], *params: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.sweep, ctx.group, ctx.n_params, ctx.params = sweep, group, n_params, params
        ctx.autocast = _autocast_of(x.device.type)
        blocks = sweep.gpt.transformer.h
        ctx.seeds = [int(torch.randint(2**62, ())) if blocks[i].training else None for i in group]
        place = sweep.layers.place
        ctx.inputs = keep(x[0], place) if sweep.differentiated else None
        for i, seed in zip(group, ctx.seeds, strict=True):
            x, log = _forward(sweep, i, keep(x[0], "device"), seed, x, place if sweep.differentiated else None)
        ctx.last_log = log
        return x, torch.zeros((), dtype=exact(x.dtype), device=x.device)

    @staticmethod
    def backward(ctx: Any, d_output: torch.Tensor, d_kept: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.inputs is None:
            raise RuntimeError("the gradients of this pass through caches have been taken already: compute it anew")
        sweep, inputs, logs = ctx.sweep, [ctx.inputs], []
        ctx.inputs = None
        with torch.no_grad(), torch.autocast(**ctx.autocast):  # the backward pass leaves it
            for i, seed in zip(ctx.group[:-1], ctx.seeds, strict=False):
                x, log = _forward(sweep, i, inputs[-1], seed, d_output, "device")
                inputs.append(keep(x[0], "device"))
                logs.append(log)
                del x
        logs.append(ctx.last_log)
        ctx.last_log = None
        d_x = d_output.contiguous()
        ends = list(accumulate(ctx.n_params))
        d_params: list[torch.Tensor | None] = []
        for i, seed, end, n in reversed(list(zip(ctx.group, ctx.seeds, ends, ctx.n_params, strict=True))):
            own = ctx.params[end - n : end]
            found = _backward(sweep, i, inputs.pop(), logs.pop(), seed, own, d_x, d_kept, ctx.autocast)
            d_params = found + d_params
        return d_x, None, None, None, *d_params


def _forward(
    sweep: _Sweep, block_idx: int, inputs: Kept, seed: int | None, like: torch.Tensor, log_place: str | None
) -> tuple[torch.Tensor, Log | Attended | None]:
    """Outputs of a layer, as a tensor `like` another, and the calls of its cache, if it has one, to be put into a place; or of rows
    that run whole, what their attention came to."""
    block, seen, output = sweep.gpt.transformer.h[block_idx], sweep.seen[block_idx], torch.empty_like(like)
    cache = sweep.make_cache(block_idx) if seen is None else None
    tokens, calls = StoredTokens(output.shape[1]), []
    for index, chunk in enumerate(sweep.chunks):
        if cache is not None:
            stand_in: nn.Module = Serving(cache, chunk, sweep)
        else:
            stand_in = ByPosition(block.attn.mha, chunk, seen, tokens.at(spans_before(chunk, seen)))
        output[:, chunk.tokens] = sweep.run(block, index, inputs.rows(chunk.spans)[None], stand_in, seed)
        if cache is not None:
            calls.append(stand_in.calls)
        elif index + 1 < len(sweep.chunks):
            tokens.put(chunk.tokens, stand_in.key, stand_in.value)
    if cache is None or log_place is None:
        return output, stand_in.attended if sweep.whole and log_place is not None else None
    return output, Log(calls, log_place)


def _backward(
    sweep: _Sweep,
    block_idx: int,
    inputs: Kept,
    log: Log | Attended | None,
    seed: int | None,
    params: Sequence[torch.Tensor],
    d: torch.Tensor,
    d_kept: torch.Tensor,
    autocast: dict[str, Any],
) -> list[torch.Tensor | None]:
    """Gradients of the parameters of a layer. Those of its outputs, `d` (1, N, E), become those of its inputs. `d_kept`
    is that of the keep loss, if there is one."""
    block, seen = sweep.gpt.transformer.h[block_idx], sweep.seen[block_idx]
    cache = sweep.make_cache(block_idx) if seen is None else None
    with torch.autocast(**autocast):
        n_chunks = len(sweep.chunks) - 1  # whose tokens later ones may see
        tokens = _keys_and_values(sweep, block, inputs, seed, n_chunks if cache is None else max(1, n_chunks))
    keeping = None
    if sweep.keep_loss is not None and isinstance(cache, ScoreKVCache):
        keeping = LayerKeepLoss(sweep.keep_loss, tokens, sweep.begins.tolist(), cache.policy.observes)
        d_kept = d_kept / (len(sweep.chunks) * sweep.keep_loss.n_layer)
    divided = isinstance(block, FSDPModule)  # every process has to have gradients of the same parameters
    d_params: list[torch.Tensor | None] = [torch.zeros_like(p) if divided else None for p in params]
    for index in reversed(range(len(sweep.chunks))):
        chunk = sweep.chunks[index]
        calls = [] if cache is None else log.calls(index)
        places = calls[0].places if calls else spans_before(chunk, seen)
        stored = [x.requires_grad_() for x in tokens.at(places)]
        own = inputs.rows(chunk.spans)[None].detach().requires_grad_()
        if cache is not None:
            stand_in: nn.Module = Again(cache, chunk, sweep, calls=calls, stored=stored, n_tokens=d.shape[1])
        else:
            stand_in = ByPosition(block.attn.mha, chunk, seen, stored, log)
        spared = nullcontext() if autocast["enabled"] else gradients_only(block)
        with torch.enable_grad(), torch.autocast(**autocast), spared:
            y = sweep.run(block, index, own, stand_in, seed)
        outputs, gradients = [y], [d[:, chunk.tokens]]
        for new, d_new in zip((stand_in.key, stand_in.value), tokens.gradients(chunk.tokens), strict=False):
            if new.requires_grad:
                outputs.append(new)
                gradients.append(d_new)
        needed = []
        if keeping is not None:
            needed = keeping.chunk(chunk, stand_in.query, stand_in.key, stored[0], calls[0].fields[1])
            outputs += [loss for loss, _, _ in needed]
            gradients += [d_kept] * len(needed)
        leaves = [*stored, *(leaf for _, _, leaf in needed)]
        d_own, *found = torch.autograd.grad(outputs, [own, *leaves, *params], gradients, allow_unused=True)
        d[:, chunk.tokens] = d_own
        tokens.add_gradients(places, found[: len(stored)])
        for (_, of_needed, _), d_leaf in zip(needed, found[len(stored) :], strict=False):
            tokens.add_gradients(of_needed, [d_leaf, None])
        for i, d_param in enumerate(found[len(leaves) :]):
            if d_param is not None:
                d_params[i] = d_param if d_params[i] is None else d_params[i].add_(d_param)
    if cache is not None:
        cache.storage.detach_graph()
    return d_params


@torch.no_grad()
def _keys_and_values(sweep: _Sweep, block: nn.Module, inputs: Kept, seed: int | None, n_chunks: int) -> StoredTokens:
    """Keys and values in a layer of the tokens of the first chunks."""
    tokens = StoredTokens(sweep.idx.shape[1])
    for index, chunk in enumerate(sweep.chunks[:n_chunks]):
        only, x = KeysAndValuesOnly(), inputs.rows(chunk.spans)[None]
        with _cache_of(block, only), _seeded(seed, index), suppress(FoundError):
            block.attn(block.norm_1(x), sweep.ropes[index], _NO_PLAN, sweep.idx[:, chunk.tokens])
        tokens.put(chunk.tokens, only.key, only.value)
    return tokens


_NO_PLAN = Plan([], (), ())


def _autocast_of(device: str) -> dict[str, Any]:
    """Arguments of the `torch.autocast` that is in force."""
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "enabled": enabled, "dtype": torch.get_autocast_dtype(device) if enabled else None}


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
    # `torch.manual_seed` notes every call, with its traceback, for a GPU that was not used yet
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed((seed + index) % 2**63)
        if devices:
            torch.cuda.manual_seed((seed + index) % 2**63)
        yield
