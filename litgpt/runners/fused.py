"""All layers on CPU in one kernel call: for small models PyTorch's overhead is as large as the arithmetic.

`FusedLayers` computes the outputs of `GPT.run_layers` from the same weights, caches and plans; unsupported calls are left to
`run_layers`. Decode and prefill steps have separate kernels; models in float32 have those of decode steps only.
"""

import ctypes
import dataclasses
import weakref
from collections.abc import Sequence

import torch
from torch import nn

from litgpt.attention import attention_scale
from litgpt.config import Config
from litgpt.kernels import ops
from litgpt.kernels.library import float32_library, library
from litgpt.kernels.structs import (
    PLAIN,
    Ends,
    Layer,
    Rope,
    Segment,
    Shape,
    StepPlan,
    TailSegment,
    Vectors,
    Weight,
    address,
)
from litgpt.kvcache import KVCache
from litgpt.kvcache.layers import LayerCaches
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.plan import Part, Plan
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.score import ScoreKVCache
from litgpt.kvcache.score_kernels import can_evict
from litgpt.model import GPT, Block, CausalSelfAttention, GemmaMLP, LLaMAMLP, Multiply, RMSNorm
from litgpt.rope import Rope as RopeRows
from litgpt.runners.opaque_weights import LowRankLayer, OpaqueLayer
from litgpt.runners.packed_weights import PackedGatedMLP
from litgpt.runners.watch import ModuleWatch

WEIGHTS = ("qkv", "proj", "gate", "up", "down")
KEPT_SCRATCH = 8 << 20  # most numbers of intermediate results that are kept from call to call

# Every field of `Config` is in one of these tables; a new field must have its default.
REQUIRED = {  # the only supported values
    "norm_class_name": ("RMSNorm",),
    "parallel_residual": (False,),
    "shared_attention_norm": (False,),
    "mlp_class_name": ("LLaMAMLP", "GemmaMLP"),
    "n_expert": (0,),
    "swiglu_limit": (None,),
    "latent_attention": (None,),
}
HANDLED = {
    # by the arguments of the kernels
    *("n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size", "rotary_percentage"),
    *("rope_interleave", "rope_indices", "rope_local_base_freq", "nope_indices", "attention_scores_scalar"),
    *("attention_logit_softcapping", "attention_sinks", "gelu_approximate", "norm_eps", "norm_unit_offset"),
    *("norm_1", "norm_2", "norm_qk", "norm_qk_type", "post_attention_norm", "post_mlp_norm", "residual_multiplier"),
    *("bias", "attn_bias"),
    # by the plans
    *("sliding_window_size", "sliding_window_indices"),
}
OUTSIDE = {
    *("name", "hf_config", "block_size", "vocab_size", "padding_multiple", "padded_vocab_size"),
    *("scale_embeddings", "embedding_multiplier"),  # of `GPT.embed`
    *("lm_head_bias", "final_logit_softcapping", "logits_divisor"),  # of `GPT.logits`
    *("rope_base", "rope_condense_ratio", "rope_adjustments"),  # of the RoPE table
    "norm_affine",  # of LayerNorm
    *("moe_intermediate_size", "n_shared_expert", "n_expert_groups", "n_topk_groups", "n_topk_scores_per_group"),
    *("n_expert_per_token", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob", "router_bias"),
    "start_of_layer_hook",  # models with hooks ask no runner
}


def knows_config(config: Config) -> bool:
    """Whether the kernels support layers of this configuration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in REQUIRED and value not in REQUIRED[field.name]:
            return False
        if field.name not in HANDLED | OUTSIDE | REQUIRED.keys() and value != field.default:
            return False
    return True


def fuse_layers(model: GPT) -> bool:
    """Run all layers of `model` in one call, if the kernels support them; returns whether they do.

    `model.layer_runner = None` undoes it, and is required before layers or their weights are replaced.
    """
    layers = (
        [_layer(block, model.dtype) for block in model.transformer.h]
        if ops.available() and _is_supported(model)
        else [None]
    )
    if None in layers:
        return False
    fused = FusedLayers(model, layers)
    if fused.watch.has_hooks():
        return False
    model.layer_runner = fused
    return True


class FusedLayers:
    """A `LayerRunner` that runs all layers in one kernel call."""

    static_shapes = False

    def __init__(self, model: GPT, layers: list[Layer]) -> None:
        config, first = model.config, model.transformer.h[0]
        self.model = weakref.ref(model)  # which has this runner
        self.dtype = model.dtype
        self.kernels = float32_library() if self.dtype == torch.float32 else library()
        self.blocks = list(model.transformer.h)
        self.layers = list((Layer * len(layers))(*layers))  # which share the array; its items are new objects each time
        self.plan_of_layer = [0] * len(layers)  # as `layers` have it
        self.has_low_rank = any(
            getattr(layer, name).rank for layer in layers for name in WEIGHTS
        )  # in decode steps only
        self.shape = Shape(
            *(config.n_embd, config.n_head, config.n_query_groups, config.head_size, layers[0].gate.N),
            *(config.rope_n_elem, config.rope_interleave, _activation(first.mlp)),
            *(config.norm_qk and config.norm_qk_type == "olmo2", config.norm_eps, config.norm_unit_offset),
            *(attention_scale(config), config.attention_logit_softcapping or 0.0),
            *(getattr(first.post_attention_norm, "factor", 1.0), getattr(first.post_mlp_norm, "factor", 1.0)),
            model.transformer.ln_f.weight.data_ptr(),
        )
        self.inner_shape = Shape.from_buffer_copy(self.shape)  # of layers that others follow
        self.inner_shape.final_norm = None
        self.ends = _ends(model)
        self.no_ends, self.runs_head = Ends(), bool(self.ends.head.w)
        self._plans = (StepPlan * len(layers))()
        self.plans = list(self._plans)
        self._ropes = (Rope * len(layers))()
        self.ropes = list(self._ropes)
        self.scratch: torch.Tensor | None = None
        self.memory: object = None  # `LayerCaches.memory` when `layers` were pointed to the buffers of the caches
        modules = [module for block in self.blocks for module in block.modules()] + [model.transformer.ln_f]
        places = [(model.transformer, "wte")] * bool(self.ends.table) + [(model, "lm_head")] * self.runs_head
        modules += [module for owner, name in places for module in getattr(owner, name).modules()]
        self.watch = ModuleWatch(modules, apart=model.kv_caches(), places=places)

    def __call__(
        self,
        idx: torch.Tensor,
        rope: list[RopeRows],
        plans: list[Plan],
        input_pos: int,
        output_tokens: Sequence[int] | None = None,
        head: bool = False,
    ) -> torch.Tensor | None:
        B, T = idx.shape
        model = self.model()
        if self.watch.has_hooks() or not self.watch.is_unchanged() or not self._has_caches(model.caches):
            return None
        ids = list(map(id, plans))
        different = list(dict(zip(ids, plans, strict=True)).values())
        is_prefill = B * T > ops.MAX_ROWS or not all(
            _set_decode_plan(*pair, B, T, self.dtype) for pair in zip(self.plans, different, strict=False)
        )
        if is_prefill:
            if not self._has_prefill():
                return None
            evictions = any(part.tails is not None for plan in different for part in plan.parts)
            segments = [_segments(plan, B, T) for plan in different]
            if None in segments or (evictions and not self.runs_evictions(model.kv_caches())):
                return None
            for target, (own, tails) in zip(self.plans, segments, strict=False):
                target.segments, target.n_segments = ctypes.addressof(own), len(own)
                target.tails, target.n_tails = ctypes.addressof(tails), len(tails)
        plan_of_layer = list(map(list(map(id, different)).index, ids))
        if plan_of_layer != self.plan_of_layer:
            self.plan_of_layer = []  # until all layers have theirs: an interrupt can come in between
            for layer, number in zip(self.layers, plan_of_layer, strict=True):
                layer.plan = number
            self.plan_of_layer = plan_of_layer
        for target, (cos, sin) in zip(self.ropes, rope, strict=False):
            target.cos, target.sin = cos.data_ptr(), sin.data_ptr()
            target.row_stride = cos.stride(0) if len(cos) > 1 else 0
        if not is_prefill:
            return self._decode(idx, model, output_tokens, head)
        x = self._prefill(idx, model, plans, output_tokens)
        return model.lm_head(x) if head else x

    def _decode(self, idx: torch.Tensor, model: GPT, output_tokens: Sequence[int] | None, head: bool) -> torch.Tensor:
        """A step, whose plans `plans` has, with embeddings and head by the kernel where it can."""
        (B, T), ends, x = idx.shape, self.ends, None
        if ends.table and idx.is_cpu and idx.dtype in (torch.int64, torch.int32):  # torch refuses others
            idx = idx.long().contiguous()
            ends.ids = idx.data_ptr()
        else:
            ends.ids, x = None, model.embed(idx).contiguous()
        if head and output_tokens is None:
            y = torch.empty(B, T, ends.head.N, dtype=self.dtype, device="cpu")
            ends.logits = y.data_ptr()
        else:
            y = x = torch.empty(B, T, self.shape.E, dtype=self.dtype, device="cpu") if x is None else x
            ends.logits = None
        self._run(self.shape, 0, len(self.layers), ends, x, None, B, T, None)
        if output_tokens is None:
            return y
        y = y.view(-1, y.shape[-1])[output_tokens][:, None]
        return model.lm_head(y) if head else y

    def _prefill(
        self, idx: torch.Tensor, model: GPT, plans: list[Plan], output_tokens: Sequence[int] | None
    ) -> torch.Tensor:
        """A call with segments."""
        B, T = idx.shape
        x = model.embed(idx).contiguous()
        scratch = self._scratch(B * T * self._scratch_of_token(), x)
        rows = None if output_tokens is None else (ctypes.c_int64 * len(output_tokens))(*output_tokens)
        looks = [i for i, plan in enumerate(plans) if _is_looked_at(plan)]
        first, last = 0, len(self.layers) - 1
        for stop in looks if last in looks else [*looks, last]:
            final = stop == last
            shape = self.shape if final else self.inner_shape
            self._run(shape, first, stop + 1 - first, self.no_ends, x, scratch, B, T, rows if final else None)
            if stop in looks:
                self._look(plans[stop], model, stop, scratch, B, T)
            first = stop + 1
        return x if rows is None else x.view(-1, x.shape[-1])[: len(rows), None]

    def _run(
        self,
        shape: Shape,
        first: int,
        count: int,
        ends: Ends,
        x: torch.Tensor | None,
        scratch: torch.Tensor | None,
        B: int,
        T: int,
        rows: "ctypes.Array[ctypes.c_int64] | None",
    ) -> None:
        """Run `count` layers from layer `first` on."""
        parts = (
            ctypes.byref(shape),
            ctypes.byref(self.layers[first]),
            count,
            self._plans,
            self._ropes,
            ctypes.byref(ends),
        )
        if not self.kernels.run_layers(
            *parts, address(x), address(scratch), B, T, rows, 0 if rows is None else len(rows)
        ):
            raise IndexError(f"idx has tokens outside 0..{ends.V - 1}, the embeddings that there are")

    def _has_prefill(self) -> bool:
        """Whether calls with many tokens can be supported."""
        return self.dtype == torch.bfloat16 and ops.multiplies_fast() and not self.has_low_rank

    def runs_evictions(self, caches: Sequence[KVCache]) -> bool:
        """Whether a call may go on after an eviction by score, in all of these caches that have such."""
        kinds = (cache for cache in caches if isinstance(cache, ScoreKVCache))
        return self._has_prefill() and all(map(can_evict, kinds))

    def _scratch_of_token(self) -> int:
        """Numbers that the kernels for a prefill need for each token."""
        H, G, D = self.shape.H, self.shape.G, self.shape.D
        return (2 * (H + G) + 2 * G * any(layer.encoded[0].kind for layer in self.layers)) * D

    def _scratch(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for intermediate results: the same in every call, unless it is large. The holes that it would leave in the heap
        are soon too small for it."""
        if size > KEPT_SCRATCH:
            return like.new_empty(size)
        if self.scratch is None or len(self.scratch) < size:
            self.scratch = None  # before there is more
            with torch.inference_mode(False):
                self.scratch = like.new_empty(size)
        return self.scratch[:size]

    def _look(self, plan: Plan, model: GPT, block_idx: int, scratch: torch.Tensor, B: int, T: int) -> None:
        """Let the cache of a layer look at the prompts that the layer has just run, of T tokens in each row of the call."""
        cache, sinks = model.kv_caches()[block_idx], model.transformer.h[block_idx].attn.sinks
        H, G, D = self.shape.H, self.shape.G, self.shape.D
        tokens = scratch[: B * T * (H + 2 * G) * D].view(-1, H + 2 * G, D)
        for part in (part for part in plan.parts if part.steps[0].prompt):
            size = part.steps[0].queries.stop
            rows = [tokens[start : start + size] for _, start in _places(part, B, T)]
            stacked = rows[0][None] if len(rows) == 1 else torch.stack(rows)
            cache.look_at_prompt(part, NewTokens(*stacked.transpose(1, 2).split((H, G, G), dim=1), sinks))

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model runs its own layers, one by one."""

    def _has_caches(self, caches: LayerCaches) -> bool:
        """Point `layers` to the buffers of the caches; False if a cache is not supported."""
        memory = caches.memory()
        if self.memory is memory:
            return True
        if not all(_is_supported_cache(cache, self.dtype) for cache in caches.caches):
            return False
        self.memory = None  # until all layers point to theirs: an interrupt can come in between
        for layer, cache in zip(self.layers, caches.caches, strict=True):
            keys, values = cache.storage.kernel_view()
            layer.keys, layer.values, layer.queries = map(address, (keys, values, cache.kept_queries()))
            layer.row_stride, layer.head_stride, _, _ = keys.stride()
            layer.encoded = (Vectors * 2)(*(cache.storage.kernel_codes() or ()))
            slots = cache.head_slots
            layer.first_slots, layer.extra_slots = (None, None) if slots is None else map(address, slots)
            if slots is not None:  # the first slots of heads say where they are
                layer.head_stride = 0
                for vectors in layer.encoded:
                    vectors.strides[1] = vectors.scale_strides[1] = 0
            if cache.kept_queries() is not None:
                layer.query_row_stride, layer.query_head_stride, _, _ = cache.kept_queries().stride()
            if isinstance(cache, ScoreKVCache):
                layer.positions, layer.sums = map(address, cache.policy_state.kept_numbers())
        self.memory = memory
        return True


def _ends(model: GPT) -> Ends:
    """The table of embeddings and the head, those of both that the kernels support."""
    config, wte, head, ends = model.config, model.transformer.wte, _weight(model.lm_head, model.dtype), Ends()
    is_plain = type(wte) is nn.Embedding and wte.weight.dtype == model.dtype and wte.weight.is_contiguous()
    is_scaled = config.scale_embeddings or config.embedding_multiplier != 1.0
    if is_plain and not is_scaled and type(model).embed is GPT.embed:
        ends.table, ends.V = wte.weight.data_ptr(), len(wte.weight)
    if head is not None and type(model).logits is GPT.logits:
        ends.head = head
    return ends


def _set_decode_plan(target: StepPlan, plan: Plan, B: int, T: int, dtype: torch.dtype) -> bool:
    """Copy a plan for a few tokens to `target`; False unless it stores all, then attends to a range of slots."""
    parts = plan.parts if plan.together is None else [plan.together]
    part = parts[0]
    step = part.steps[0]
    simple = len(parts) == len(part.steps) == 1 and part.spans is None and part.chunk_rows is None and not step.prompt
    whole = slice(0, T)
    if not (simple and step.write_first and step.new is None and step.write == whole == step.queries):
        return False
    bias, read = step.bias, step.read
    if step.consecutive is not None:
        tiles = step.consecutive.tiles
        if len(tiles) > 1:
            return False
        bias, read = tiles[0].bias, slice(read.start + tiles[0].k0, read.start + tiles[0].k1)
    if isinstance(read, torch.Tensor):
        return False
    target.rows = address(part.rows)
    target.slots, target.slots_by_row = step.slots.data_ptr(), step.slots.ndim > 1
    target.first, target.N = (0, bias.shape[-1]) if read is None else (read.start, read.stop - read.start)
    target.bias, target.n_segments, target.n_tails = address(bias), 0, 0
    target.sealed, target.newest = None, 0
    if step.sealed is not None:
        target.sealed, target.newest = address(step.sealed.by_row(B)), step.sealed.slots
    queries = step.query_slots
    target.query_slots, target.n_queries = address(queries), 0 if queries is None else queries.shape[-1]
    target.query_slots_by_row = queries is not None and queries.ndim > 1
    if bias is not None:
        if bias.dtype != dtype or bias.stride(-1) != 1 or (bias.ndim == 4 and bias.shape[1] != 1):
            return False
        target.bias_strides[0] = bias.stride(0) if bias.ndim == 4 and len(bias) > 1 else 0
        target.bias_strides[1] = bias.stride(-2) if bias.shape[-2] > 1 else 0
    return True


def _is_looked_at(plan: Plan) -> bool:
    """Whether the cache looks at whole prompts."""
    return any(part.steps[0].prompt for part in plan.parts)


def _places(part: Part, B: int, T: int) -> list[tuple[int, int]]:
    """For each row of a part: the row of the cache, and the first of its tokens among those of a call (B, T)."""
    chunk_rows = range(B) if part.chunk_rows is None else part.chunk_rows.tolist()
    starts = [b * T for b in chunk_rows] if part.spans is None else [span.start for span in part.spans]
    return list(zip(chunk_rows if part.rows is None else part.rows.tolist(), starts, strict=True))


def _segments(plan: Plan, B: int, T: int) -> "tuple[ctypes.Array[Segment], ctypes.Array[TailSegment]] | None":
    """The segments of a plan for many tokens of every row, and those whose policies score tokens several times; None unless they
    attend to consecutive slots, or to a ring."""
    found, tails = [], []
    for part in plan.parts:
        if part.tails is not None:
            tails += [part.tails.segment(i, *place) for i, place in enumerate(_places(part, B, T))]
            continue
        step, ring = part.steps[0], part.ring
        if step.sealed is not None:
            found += [segment for row, start in _places(part, B, T) for segment in _sealing_segments(part, row, start)]
            continue
        if ring is not None:
            size, write, slots = part.steps[-1].queries.stop, ring.write, ring.slots
            keys = 0, len(ring.old) + size, ring.seen
            old = ring.old.data_ptr(), len(ring.old), ring.n_sink
        else:
            if len(part.steps) > 1 or step.consecutive is None or not (step.write_first or step.read is None):
                return None
            if step.read is not None and step.consecutive.T <= ops.MAX_QUERIES:  # to lay out all keys would take longer
                return None
            size, write, slots = step.consecutive.T, step.write, step.slots
            read = slice(0, 0) if step.read is None else step.read
            keys = read.start, read.stop - read.start, step.consecutive.window or step.consecutive.N
            old = None, 0, 0
        places = _places(part, B, T)
        queries = [None] * len(places) if step.query_slots is None else step.query_slots.expand(len(places), -1)
        kept = write if isinstance(write, torch.Tensor) else None
        n_kept = size if isinstance(write, slice) else 0 if write is None else len(write)
        for (row, start), query_slots in zip(places, queries, strict=True):
            found.append(
                Segment(
                    *(start, size, row, *keys, address(kept), address(slots), n_kept),
                    *(address(query_slots), 0 if query_slots is None else len(query_slots), *old),
                )
            )
    return (Segment * len(found))(*found), (TailSegment * len(tails))(*tails)


def _sealing_segments(part: Part, row: int, start: int) -> list[Segment]:
    """Those of a row of the cache whose tokens begin at `start` in the call, where the storage encodes many tokens at a time."""
    found, begin, before = [], part.steps[0].read.stop - part.steps[0].consecutive.T, part.steps[0].sealed.counts[0]
    for step in part.steps:
        T, N, sealed = step.consecutive.T, step.read.stop, step.sealed
        kept = (None, None, 0) if sealed.kept is None else (*map(address, sealed.kept), len(sealed.kept[0]))
        place = start + step.queries.start, T, row, 0, N, N
        found.append(Segment(*place, *kept, None, 0, None, 0, 0, sealed.counts[0], before, begin, sealed.slots))
        before = sealed.counts[0]
    return found


def _is_supported_cache(cache: KVCache | None, dtype: torch.dtype) -> bool:
    return (
        isinstance(cache, PlannedKVCache)
        and type(cache).run is PlannedKVCache.run
        and cache.dtype == dtype
        and cache.storage.kernel_view() is not None
        and (cache.storage.kernel_codes() is None or (dtype == torch.bfloat16 and ops.reads_codes()))
        and cache.mha.is_plain()
    )


def _layer(block: nn.Module, dtype: torch.dtype) -> Layer | None:
    """The constant arguments of a layer; None if it is not supported."""
    if type(block) is not Block or type(block.attn) is not CausalSelfAttention:
        return None
    attn, mlp = block.attn, block.mlp
    norms = {
        "norm_1": block.norm_1,
        "norm_q": attn.norm_q,
        "norm_k": attn.norm_k,
        "post_attention_norm": block.post_attention_norm,
        "norm_2": block.norm_2,
        "post_mlp_norm": block.post_mlp_norm,
    }
    weights = {"qkv": _weight(attn.qkv, dtype), "proj": _weight(attn.proj, dtype), **_mlp_weights(mlp, dtype)}
    kinds = (RMSNorm, nn.Identity, Multiply, type(None))
    if None in weights.values() or not weights or not all(type(norm) in kinds for norm in norms.values()):
        return None
    if any(getattr(weights["gate"], name) != getattr(weights["up"], name) for name in ("kind", "group")):
        return None
    if weights["gate"].bias or weights["up"].bias:
        return None
    return Layer(
        **{name: norm.weight.data_ptr() if type(norm) is RMSNorm else None for name, norm in norms.items()},
        **weights,
        sinks=address(attn.sinks),
        rope=-1 if attn.rope_kind is None else attn.rope_kind,
    )


def _mlp_weights(mlp: nn.Module, dtype: torch.dtype) -> dict[str, Weight | None]:
    if type(mlp) is PackedGatedMLP:
        return mlp.kernel_weights() or {"gate": None}
    if type(mlp) in (LLaMAMLP, GemmaMLP):
        return {"gate": _weight(mlp.fc_1, dtype), "up": _weight(mlp.fc_2, dtype), "down": _weight(mlp.proj, dtype)}
    return {"gate": None}


def _activation(mlp: nn.Module) -> int:
    return mlp.activation if type(mlp) is PackedGatedMLP else ops.ACTIVATIONS[mlp.activation]


def _weight(linear: nn.Module, dtype: torch.dtype) -> Weight | None:
    if isinstance(linear, LowRankLayer):
        weight, found = _weight(linear.linear, dtype), linear.low_rank()
        if weight is None or found is None or found[0].dtype != dtype:
            return None
        a, b = found
        weight.rank, weight.a, weight.b = len(a), address(a), address(b)
        return weight
    if dtype != torch.float32:
        return linear.kernel_weight() if isinstance(linear, OpaqueLayer) else None
    if type(linear) is not nn.Linear or linear.weight.dtype != dtype or not linear.weight.is_contiguous():
        return None
    N, K = linear.weight.shape
    return Weight(kind=PLAIN, K=K, N=N, w=address(linear.weight), bias=address(linear.bias))


def _is_supported(model: GPT) -> bool:
    config, wte = model.config, model.transformer.wte
    return (
        wte.weight.device.type == "cpu"
        and (model.dtype == torch.bfloat16 or (model.dtype == torch.float32 and float32_library() is not None))
        and knows_config(config)
        and config.head_size <= ops.MAX_HEAD_SIZE
        and config.rope_n_elem <= config.head_size
        and config.rope_n_elem % 2 == 0
        and type(model.transformer.ln_f) is RMSNorm
    )
