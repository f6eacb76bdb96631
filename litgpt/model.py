"""The model: one GPT whose `Config` flags cover the families of open language models.

Letters: B batch rows, T tokens of a call, E embedding size, H query heads, G key/value heads ("query groups"), D head size.
`CausalSelfAttention` computes queries, keys and values and makes one call: to its key-value cache when `input_pos` is
given, to `attention.py` otherwise. It knows neither masks nor slots.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.attention import MultiHeadSelfAttention, do_softcapping
from litgpt.attention_utils import build_mask_cache as build_mask_cache
from litgpt.config import Config, StartOfLayerHook
from litgpt.device_tensor import device_tensor
from litgpt.indexing import batched_index_copy_ as batched_index_copy_
from litgpt.indexing import batched_index_select as batched_index_select
from litgpt.kernels import ops
from litgpt.kernels.row_attention import Seen, attend_rows, can_attend_rows
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache import KVCache, KVCacheParams
from litgpt.kvcache.layers import LayerCaches
from litgpt.kvcache.plan import Plan
from litgpt.moe import Experts, GroupedTopkRouter
from litgpt.rope import Rope, RopeTable, layer_rope, rotate
from litgpt.rope import apply_rope as apply_rope
from litgpt.rope import apply_rope_interleave as apply_rope_interleave
from litgpt.rope import build_rope_cache as build_rope_cache
from litgpt.rope import yarn_get_mscale as yarn_get_mscale

if TYPE_CHECKING:
    from litgpt.runners.runner import LayerRunner


class Rows(NamedTuple):
    """In place of a plan, in training: the tokens of a call are rows of these sizes, one after the other."""

    sizes: tuple[int, ...]


def attend_without_cache(
    mha: MultiHeadSelfAttention,
    block_idx: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Rows | None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention (B, T, H * D) of queries (B, H, T, D) over the keys and values (B, G, T, D) of the same tokens; with
    `Rows`, within each row."""
    sizes = [query.shape[2]] if plan is None else plan.sizes
    plain = type(mha) is MultiHeadSelfAttention and mha.has_plain_scores()  # not what a script put in its place
    if plain and sink_logits is None and can_attend_rows(query, key, value):
        return attend_rows(query, key, value, sizes, mha.scale, Seen.within(mha.config.window(block_idx)))
    rows = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    outputs = [mha(q, DefaultKeysAndValues(k, v), block_idx, sink_logits=sink_logits)[0] for q, k, v in rows]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _rope_values(name: str, what: str) -> property:
    """A property of `GPT` for a part of its RoPE table."""

    def get(model: "GPT") -> torch.Tensor:
        model.rope_table.cover(model.max_seq_length, model.device)
        return getattr(model.rope_table, name)

    def set(model: "GPT", value: torch.Tensor) -> None:
        setattr(model.rope_table, name, value)

    return property(get, set, doc=f"RoPE's {what} of at least `max_seq_length` positions, float32.")


class GPT(nn.Module):
    """A decoder-only transformer.

    Key-value caches are made by `set_kv_caches` (or given by `assign_kv_caches`) and used by calls with `input_pos`.
    """

    config_class: ClassVar[type[Config]] = Config
    quantization: object = None  # the `Scheme` of quantised weights, set by `litgpt.runners.quantized_weights`

    def __init__(self, config: Config, **mha_kwargs: Any) -> None:
        """`mha_kwargs` are arguments of `MultiHeadSelfAttention`, for layers and default caches."""
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, block_idx) for block_idx in range(config.n_layer)),
                "ln_f": config.norm_class(config.n_embd, eps=config.norm_eps),
            }
        )
        self.mha = MultiHeadSelfAttention(config, **mha_kwargs)
        for block in self.transformer.h:
            block.attn.mha = self.mha
        self._max_seq_length = config.block_size
        self.rope_table = RopeTable(config)
        self.caches = self._attached = LayerCaches()  # of all layers, and those that the layers have now
        self._start_of_layer_hook: StartOfLayerHook | None = config.start_of_layer_hook
        self.layer_devices: list[torch.device] | None = None  # of blocks that are on several devices
        self.layer_runner: LayerRunner | None = None  # a faster `run_layers`, for calls with caches

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the model computes in."""
        wte = self.transformer.wte
        weight = wte.weight
        return weight.dtype if weight.is_floating_point() else wte.dtype  # of a quantised table

    @property
    def static_shapes(self) -> bool:
        """Whether the layer runner needs constant shapes as sequences grow."""
        return self.layer_runner is not None and self.layer_runner.static_shapes

    @classmethod
    def from_name(cls, name: str, **kwargs: object) -> "GPT":
        """A model with random weights and the configuration called `name`, its fields overridden by `kwargs`."""
        return cls(cls.config_class.from_name(name, **kwargs))

    # -- forward

    def forward(
        self,
        idx: torch.Tensor,
        input_pos: int | torch.Tensor | None = None,
        lm_head_chunk_size: int = 0,
        skip_lm_head: bool = False,
        *,
        last_token_only: bool = False,
        rows: Sequence[int] | None = None,
        row_sizes: Sequence[int] | None = None,
        input_pos_maxp1: int | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Logits for every token of `idx`, given what came before it.

        Args:
            idx: tokens (B, T) or (T,).
            input_pos: position of the first token. None: no cache (training). 0: prefill, which starts new sequences. > 0:
                the next chunk; in a ragged batch the position in the longest row, while the other rows continue at their
                own lengths. (A tensor of consecutive positions is accepted, for scripts written for LitGPT.)
            lm_head_chunk_size: if positive, return a list of logits for chunks of that many tokens.
            skip_lm_head: return the final norm's output instead of logits.
            last_token_only: return the output of the last token only, (B, 1, V), or (B, 1, E) with `skip_lm_head`.
            rows: rows of the caches that the B rows of `idx` belong to (None: the first B).
            row_sizes: number of tokens of each of `rows`, if they differ. Then `idx` is (1, sum(row_sizes)), one row's tokens
                after the other's, and so is the output; with `last_token_only` it is (rows, 1, V).
            input_pos_maxp1: ignored; accepted for scripts written for LitGPT.

        Returns:
            Logits (B, T, padded_vocab_size), or a list of (B, <= lm_head_chunk_size, padded_vocab_size), or (B, T, E).

        Raises:
            ValueError: if the caches are missing or not at `input_pos`, the sequence is longer than the model takes, or
                `row_sizes` do not fit `idx`.
            IndexError: if a dense cache is full.
        """
        if idx.ndim == 1:
            idx = idx.unsqueeze(0)
        if idx.ndim != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx must be (B, T) or (T,) with at least one token, got {tuple(idx.shape)}")
        B, T = idx.shape
        if row_sizes is not None and ((rows is None) != (input_pos is None) or (B, T) != (1, sum(row_sizes))):
            raise ValueError(
                f"row_sizes={list(row_sizes)} need idx (1, {sum(row_sizes)}), and rows where there is input_pos, got "
                f"{tuple(idx.shape)}"
            )
        if input_pos is None:
            sizes = [T] if row_sizes is None else list(row_sizes)
            longest = max(sizes)
            if longest > self.max_seq_length:
                raise ValueError(f"{longest} tokens are more than max_seq_length = {self.max_seq_length}")
            long = self.needs_long_rope(longest)
            if len(sizes) == 1:
                rope, plans = self.rope_rows(0, T, long), None
            else:
                rope = self.rope_rows([0] * len(sizes), sizes, long)
                plans = [Rows(tuple(sizes))] * self.config.n_layer
            x = self.run_layers(idx, rope, plans, None)
            x = x[:, -1:] if last_token_only else x
        else:
            sizes = [T] * B if row_sizes is None else row_sizes
            output_tokens = [end - 1 for end in accumulate(sizes)] if last_token_only and T > 1 else None
            runner = self.layer_runner if self._start_of_layer_hook is None else None
            head = not skip_lm_head and lm_head_chunk_size == 0 and runner is not None and runner.runs_head
            position = _first_position(input_pos, self.next_token_pos)
            x = self._run_with_caches(idx, position, rows, row_sizes, output_tokens, runner, head)
            if head:
                return self._capped(x)
        if skip_lm_head:
            return x
        if lm_head_chunk_size > 0:
            return [self.logits(chunk) for chunk in x.split(lm_head_chunk_size, dim=1)]
        return self.logits(x)

    def run_layers(
        self, idx: torch.Tensor, rope: list[Rope], plans: list[Plan] | None, input_pos: int | None
    ) -> torch.Tensor:
        """Embedding, blocks and final norm: tensor code only, after everything about positions was planned.

        Args:
            idx: (B, T).
            rope: cosines and signed sines (B or 1, 1, T, rope_n_elem), one pair for each kind of layer.
            plans: one for each layer's cache, or None.
            input_pos: for the start-of-layer hook.
        """
        x = self.embed(idx)
        hook = self._start_of_layer_hook
        for block_idx, block in enumerate(self.transformer.h):
            if hook is not None:
                hook(x.detach(), block_idx, input_pos)
            x = block(x, rope, None if plans is None else plans[block_idx], idx)
        if hook is not None:
            hook(x.detach(), self.config.n_layer, input_pos)
        return self.transformer.ln_f(x)

    def embed(self, idx: torch.Tensor) -> torch.Tensor:
        """Scaled embeddings (B, T, E) of tokens (B, T), the input of the first layer."""
        x = self.transformer.wte(idx)
        if self.config.scale_embeddings:
            x = x * torch.full((), self.config.n_embd**0.5, dtype=x.dtype, device=x.device)
        if self.config.embedding_multiplier != 1.0:
            x = x * self.config.embedding_multiplier
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., padded_vocab_size) of final-norm outputs (..., E)."""
        return self._capped(self.lm_head(x))

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits from the head's outputs."""
        if self.config.logits_divisor != 1.0:
            logits = logits / self.config.logits_divisor
        return do_softcapping(logits, self.config.final_logit_softcapping)

    def _run_with_caches(
        self,
        idx: torch.Tensor,
        input_pos: int,
        rows: Sequence[int] | None,
        row_sizes: Sequence[int] | None,
        output_tokens: Sequence[int] | None,
        runner: "LayerRunner | None",
        head: bool,
    ) -> torch.Tensor:
        """`run_layers` with the caches, by a runner if it supports the call. `output_tokens`, `head`: see `LayerRunner`."""
        B, T = idx.shape
        sizes, packed = ([T] * B, False) if row_sizes is None else (row_sizes, True)
        static = self.static_shapes and T == 1 and rows is None
        plans, starts = self.caches.plan(input_pos, sizes, rows, packed, static, self.max_seq_length)
        if input_pos == 0:  # all tokens of a sequence are rotated by the same factors
            needed = self.needs_long_rope(max(*sizes, self.caches.expected_length))
            self.caches.long_rope = needed or (rows is not None and self.caches.long_rope)
        if not packed and len(set(starts)) == 1:
            rope = self.rope_rows(starts[0], T, self.caches.long_rope)
        else:
            rope = self.rope_rows(starts, sizes if packed else T, self.caches.long_rope)

        def layers(plans: list[Plan]) -> torch.Tensor:
            x = None if runner is None else runner(idx, rope, plans, input_pos, output_tokens, head)
            if x is not None:
                return x
            self.attach_kv_caches()
            x = self.run_layers(idx, rope, plans, input_pos)
            x = x if output_tokens is None else x.flatten(0, 1)[device_tensor(output_tokens, x.device), None]
            return self.lm_head(x) if head else x

        sinks = (
            [block.attn.sinks for block in self.transformer.h] if self.config.attention_sinks else [None] * len(plans)
        )
        return self.caches.run(plans, layers, sinks)

    def broadcast_tokens(self, tokens: list[int]) -> list[int]:
        """The drawn tokens that all processes sharing this model continue with; here there is one process."""
        return tokens

    def set_start_of_layer_hook(self, hook: StartOfLayerHook | None) -> None:
        """Call `hook(x, block_idx, input_pos)` before each block with the detached layer input (B, T, E), and once more after
        the last block with `block_idx == n_layer`. None: no hook."""
        self._start_of_layer_hook = hook

    # -- positions

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a sequence, at most `config.block_size`."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if not 1 <= value <= self.config.block_size:
            raise ValueError(f"max_seq_length must be in 1..{self.config.block_size} (block_size), got {value}")
        self._max_seq_length = value
        if value > self.rope_table.length:
            self.rope_table.cover(value, self.device)

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where tokens have to be."""
        return self.transformer.wte.weight.device

    cos = _rope_values("cos", "cosines")
    sin = _rope_values("sin", "sines")

    def rope_cache_length(self) -> int:
        """Number of elements of a head that RoPE rotates, which LitGPT's `set_kv_cache` takes."""
        return self.config.rope_n_elem

    def rope_cache(self, seq_len: int | None = None, device: torch.device | None = None) -> Rope:
        """Cosines and sines of `seq_len` positions (default: `max_seq_length`), as `build_rope_cache` makes them."""
        return self.rope_table.build(self.max_seq_length if seq_len is None else seq_len, device)

    def rope_rows(self, start: int | Sequence[int], T: int | Sequence[int], long: bool = False) -> list[Rope]:
        """`RopeTable.rows` for T tokens from position `start` on."""
        return self.rope_table.rows(start, T, self.max_seq_length, self.dtype, self.device, long)

    def expect_length(self, length: int) -> None:
        """Announce the length that the sequences in the caches will have. With LongRoPE it decides by which factors they are
        rotated (otherwise the length of the prefill does); the caches are cleared if theirs were others."""
        self.caches.expected_length = length
        if self.needs_long_rope(length) != self.caches.long_rope:
            self.caches.clear()

    def needs_long_rope(self, length: int) -> bool:
        """Whether LongRoPE rotates sequences of that length by its long factors."""
        return self.rope_table.needs_long(length)

    # -- key-value caches

    def kv_caches(self) -> list[KVCache]:
        """The caches, one a layer, or an empty list."""
        return self.caches.caches

    def are_kv_caches_assigned(self) -> bool:
        """Whether every layer has a cache."""
        return bool(self.caches.caches)

    def assign_kv_caches(self, kv_caches: Iterable[KVCache]) -> None:
        """Give every layer its cache.

        Raises:
            ValueError: if caches are assigned already, or they do not fit the configuration or each other.
        """
        if self.caches.caches:
            raise ValueError("key-value caches are assigned already; call clear_kv_caches(assigned=True) first")
        caches = LayerCaches.assigned(kv_caches, self.config)
        caches.expected_length = self.caches.expected_length
        self.exchange_kv_caches(caches)

    def set_kv_caches(
        self, batch_size: int, dtype: torch.dtype | None = None, max_seq_length: int | None = None
    ) -> None:
        """Make default caches: dense, or of the window's size (and a little more) in layers with a sliding window.

        Default caches from earlier calls are replaced, unless they fit already.

        Args:
            batch_size: most rows of a batch.
            dtype: of keys and values (default: the model's).
            max_seq_length: tokens that fit (default: the model's `max_seq_length`).

        Raises:
            ValueError: if caches were given by `assign_kv_caches`, or `max_seq_length` is more than the model takes.
        """
        if self.caches.caches and not self.caches.default:
            raise ValueError("caches were given by assign_kv_caches: clear_kv_caches(assigned=True) removes them")
        length = self.max_seq_length if max_seq_length is None else max_seq_length
        if length > self.max_seq_length:
            raise ValueError(f"max_seq_length {length} is more than the model's {self.max_seq_length}")
        self.exchange_kv_caches(self.caches.defaults(self, batch_size, length, dtype, self.static_shapes))

    def layer_device(self, block_idx: int) -> torch.device:
        """The device of a layer and of its cache."""
        return self.device if self.layer_devices is None else self.layer_devices[block_idx]

    def clear_kv_caches(self, assigned: bool = False) -> None:
        """Drop default caches, and with `assigned` also those given by `assign_kv_caches`."""
        if self.caches.default or assigned:
            self.exchange_kv_caches(LayerCaches(expected_length=self.caches.expected_length))

    def exchange_kv_caches(self, others: LayerCaches, attach: bool = True) -> LayerCaches:
        """Use other caches, with what is known of the sequences in them, in place of the model's own, which are returned.

        `attach=False`, for a moment only, leaves the layers theirs until `run_layers` needs the others.
        """
        own = self.caches
        object.__setattr__(self, "caches", others)  # twice in every step, and `nn.Module` looks for parameters first
        if attach:
            self.attach_kv_caches()
        return own

    def attach_kv_caches(self) -> None:
        """Give every layer's attention its cache, unless it has it."""
        if self._attached is not self.caches:
            self._attached = None  # until all have theirs
            caches = self.caches.caches or [None] * self.config.n_layer
            for block, cache in zip(self.transformer.h, caches, strict=True):
                block.attn.kv_cache = cache
            self._attached = self.caches

    @property
    def next_token_pos(self) -> int:
        """The `input_pos` of the next token, the same in all caches (0: they are empty, or there are none)."""
        return self.caches.next_token_pos

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`set_kv_caches` by LitGPT's name; `rope_cache_length` and `device` are ignored (caches are on the model's device). The
        last three are told apart by their type: `(batch_size, max_seq_length, device, dtype)` will do."""
        dtype = next((x for x in (rope_cache_length, device, dtype) if isinstance(x, torch.dtype)), None)
        self.set_kv_caches(batch_size, dtype=dtype, max_seq_length=max_seq_length)

    def clear_kv_cache(self) -> None:
        """`clear_kv_caches` by LitGPT's name."""
        self.clear_kv_caches()

    def get_kv_cache_params(self, layer_idx: int) -> KVCacheParams | None:
        """Sizes, device and dtype of a layer's cache (None: there is no cache)."""
        return self.caches.caches[layer_idx].get_params() if self.caches.caches else None

    def kv_cache_max_tokens_forward(self) -> int | None:
        """Most tokens of a call with `input_pos > 0` (None: there are no caches)."""
        return self.caches.max_tokens_forward

    def kv_cache_max_prefill_length(self) -> int | None:
        """Most tokens of a call with `input_pos=0` (None: any number)."""
        return self.caches.max_prefill_length

    # -- weights

    def reset_parameters(self) -> None:
        """Rebuild what is not a parameter: the RoPE table."""
        self.rope_table = RopeTable(self.config)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of deviation 0.02, zero biases. Use as `model.apply(model._init_weights)`."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if (bias := getattr(module, "bias", None)) is not None:
                nn.init.zeros_(bias)


class Block(nn.Module):
    """One layer: attention and MLP, one after the other or side by side (`parallel_residual`)."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__()

        def norm(present: bool, factor: float = 1.0) -> nn.Module:
            other = nn.Identity() if factor == 1.0 else Multiply(factor)
            return config.norm_class(config.n_embd, eps=config.norm_eps) if present else other

        self.norm_1 = norm(config.norm_1)
        attention = CausalSelfAttention if config.latent_attention is None else MultiheadLatentAttention
        self.attn = attention(config, block_idx)
        self.post_attention_norm = norm(config.post_attention_norm, config.residual_multiplier)
        self.norm_2 = None if config.shared_attention_norm else norm(config.norm_2)
        is_dense = block_idx < (config.first_k_dense_replace or 0)
        self.mlp = LLaMAMLP(config) if is_dense else config.mlp_class(config)
        self.post_mlp_norm = norm(config.post_mlp_norm, config.residual_multiplier)
        self.config = config

    def forward(
        self, x: torch.Tensor, rope: list[Rope], plan: Plan | None = None, token_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, E) to (B, T, E). Arguments as for `GPT.run_layers`; `plan` is for this layer's cache."""
        rope, plan = layer_rope(rope, plan)
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, rope, plan, token_idx))
        if self.config.parallel_residual:
            normed = normed if self.norm_2 is None else self.norm_2(x)
            x = x + attended
        else:
            x = x + attended
            normed = self.norm_2(x)
        return x + self.post_mlp_norm(self.mlp(normed))


class CausalSelfAttention(nn.Module):
    """Attention of one layer: projections, norms and RoPE. The layer's `kv_cache` decides what is kept and attended to."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__()
        H, G, D = config.n_head, config.n_query_groups, config.head_size
        self.qkv = nn.Linear(config.n_embd, (H + 2 * G) * D, bias=config.bias or config.attn_bias)
        self.proj = nn.Linear(H * D, config.n_embd, bias=config.bias)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None
        self.kv_cache: KVCache | None = None
        self.mha = MultiHeadSelfAttention(config)
        if config.norm_qk:
            over_heads = config.norm_qk_type == "olmo2"  # one norm over all heads, not one a head
            self.norm_q = config.norm_class(H * D if over_heads else D, eps=config.norm_eps)
            self.norm_k = config.norm_class(G * D if over_heads else D, eps=config.norm_eps)
        else:
            self.norm_q = self.norm_k = None
        self.rope_kind: int | None = config.rope_indices[block_idx] if config.rope_local_base_freq is not None else 0
        if config.nope_indices is not None and config.nope_indices[block_idx]:
            self.rope_kind = None
        self.config = config
        self.block_idx = block_idx

    def forward(
        self, x: torch.Tensor, rope: list[Rope], plan: Plan | None = None, token_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, E) to (B, T, E). Arguments as for `GPT.run_layers`; `plan` is for this layer's cache."""
        rope, plan = layer_rope(rope, plan)
        H, G, D = self.config.n_head, self.config.n_query_groups, self.config.head_size
        B, T, _ = x.shape
        qkv = self.qkv(x)
        if self.norm_q is not None and self.config.norm_qk_type == "olmo2":
            q, k, v = qkv.split((H * D, G * D, G * D), dim=-1)
            qkv = torch.cat((self.norm_q(q), self.norm_k(k), v), dim=-1)
        heads = qkv.view(B, T, H + 2 * G, D).transpose(1, 2)
        own_rope = None if self.rope_kind is None else rope[self.rope_kind]
        rotate_heads = partial(rotate, rope=own_rope, interleave=self.config.rope_interleave)
        if self.norm_q is not None and self.config.norm_qk_type != "olmo2":
            q, k, v = heads.split_with_sizes((H, G, G), dim=1)
            q, k = rotate_heads(self.norm_q(q)), rotate_heads(self.norm_k(k))
        else:
            heads_with_rope, v = heads.split_with_sizes((H + G, G), dim=1)
            q, k = rotate_heads(heads_with_rope).split_with_sizes((H, G), dim=1)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, norms and RoPE give float32
        return self.proj(self.attend(q, k, v, plan, token_idx))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan | None, token_idx: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention outputs (B, T, H * D) of queries (B, H, T, D) over keys and values (B, G, T, D) and the cached ones."""
        if plan is None or isinstance(plan, Rows):
            return attend_without_cache(self.mha, self.block_idx, q, k, v, plan, self.sinks)
        return self.kv_cache.run(plan, q, k, v, token_idx, self.sinks)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        """Checkpoints of LitGPT before 0.5.3 call `qkv` `attn`, and interleave queries, keys and values by group."""
        for kind in ("weight", "bias", "linear.weight", "linear.bias"):  # the last two: of a layer that is wrapped
            old = state_dict.pop(f"{prefix}attn.{kind}", None)
            if old is not None:
                H, G, D = self.config.n_head, self.config.n_query_groups, self.config.head_size
                groups = old.reshape(G, H // G + 2, D, *old.shape[1:])
                parts = (groups[:, : H // G], groups[:, H // G], groups[:, H // G + 1])
                state_dict[f"{prefix}qkv.{kind}"] = torch.cat([part.reshape(-1, *old.shape[1:]) for part in parts])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MultiheadLatentAttention(nn.Module):
    """Attention with keys and values of all heads from one small vector a token (arXiv:2405.04434, section 2.1).

    Only that vector and its rotated part are cached, as one key that all heads share; the vector alone is the value. Queries
    and outputs are projected to and from its space: the same products in another order.
    """

    LATENT_EPS = 1e-6  # independent of `norm_eps`

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__()
        H, E = config.n_head, config.n_embd
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(E, H * config.qk_head_dim, bias=config.bias)
        else:
            self.q_a_proj = nn.Linear(E, config.q_lora_rank, bias=config.attn_bias)
            self.q_a_norm = RMSNorm(config.q_lora_rank, eps=self.LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * config.qk_head_dim, bias=config.bias)
        R, r = config.kv_lora_rank, config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(E, R + r, bias=config.attn_bias)
        self.kv_a_norm = RMSNorm(R, eps=self.LATENT_EPS)
        self.kv_b_proj = LatentExpansion(R, H * (config.qk_nope_head_dim + config.v_head_dim), bias=config.bias)
        self.proj = nn.Linear(H * config.v_head_dim, E, bias=config.bias)
        self.kv_cache: KVCache | None = None
        self.mha = MultiHeadSelfAttention(config)
        self.config = config
        self.block_idx = block_idx

    def forward(
        self, x: torch.Tensor, rope: list[Rope], plan: Plan | None = None, token_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, E) to (B, T, E). Arguments as for `GPT.run_layers`; `plan` is for this layer's cache."""
        rope, plan = layer_rope(rope, plan)
        config = self.config
        H, R, r, n = config.n_head, config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q, q_rotated = q.unflatten(-1, (H, n + r)).transpose(1, 2).split((n, r), dim=-1)
        latent, k_rotated = self.kv_a_proj_with_mqa(x).unsqueeze(1).split((R, r), dim=-1)
        latent = self.kv_a_norm(latent)
        q_rotated = rotate(q_rotated, rope[0], config.rope_interleave)
        k_rotated = rotate(k_rotated, rope[0], config.rope_interleave)
        if plan is None or isinstance(plan, Rows):
            k, v = self.kv_b_proj(latent[:, 0]).unflatten(-1, (H, -1)).transpose(1, 2).split((n, config.v_head_dim), -1)
            k = torch.cat((k, k_rotated.expand(-1, H, -1, -1)), dim=-1).to(v.dtype)  # float32 under autocast, as q
            query = torch.cat((q, q_rotated), dim=-1).to(v.dtype)
            return self.proj(attend_without_cache(self.mha, self.block_idx, query, k, v, plan))
        to_key, to_value = self.kv_b_proj.by_head(H, n)
        key = torch.cat((latent, k_rotated), dim=-1).to(q.dtype)
        query = torch.cat((q @ to_key, q_rotated), dim=-1).to(q.dtype)
        y = self.kv_cache.run(plan, query, key, key[..., :R], token_idx)
        y = y.unflatten(-1, (H, R)).transpose(1, 2) @ to_value.mT
        return self.proj(self.kv_b_proj.with_bias(y.transpose(1, 2), n).flatten(2))


class LatentExpansion(nn.Linear):
    """Projects the latent vector to keys and values of all heads. A class of its own because its weight is also used in
    parts: packed or quantised layers must not replace it."""

    def by_head(self, n_head: int, key_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of the weight for keys (H, key_size, R) and values (H, value_size, R)."""
        weight = self.weight.unflatten(0, (n_head, -1))
        return weight[:, :key_size], weight[:, key_size:]

    def with_bias(self, values: torch.Tensor, key_size: int) -> torch.Tensor:
        """Values (..., H, value_size) plus the bias that `by_head` leaves out (a bias of keys changes no attention weight)."""
        if self.bias is None:
            return values
        return values + self.bias.unflatten(0, (values.shape[-2], -1))[:, key_size:]


class GptNeoxMLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.fc = nn.Linear(config.n_embd, size, bias=config.bias)
        self.proj = nn.Linear(size, config.n_embd, bias=config.bias)
        self.gelu_approximate = config.gelu_approximate
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.gelu(self.fc(x), approximate=self.gelu_approximate))


class LLaMAMLP(nn.Module):
    """Gated MLP with SiLU (SwiGLU, arXiv:2002.05202)."""

    activation = "silu"  # its name in `litgpt.kernels`

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, size, bias=config.bias)
        self.fc_2 = nn.Linear(config.n_embd, size, bias=config.bias)
        self.proj = nn.Linear(size, config.n_embd, bias=config.bias)
        self.gelu_approximate = config.gelu_approximate
        self.config = config

    def gated(self, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.gated(self.fc_1(x), self.fc_2(x)))


class GemmaMLP(LLaMAMLP):
    """Gated MLP with GELU."""

    @property
    def activation(self) -> str:
        return f"gelu-{self.gelu_approximate}"

    def gated(self, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate=self.gelu_approximate) * x


class ClampedMLP(LLaMAMLP):
    """Gated MLP of GPT-OSS's experts: clamped inputs, a steeper sigmoid, and one added to the linear part."""

    SLOPE = 1.702
    activation = "clamped"  # no kernel has it

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        self.limit = config.swiglu_limit

    def gated(self, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(self.SLOPE * gate) * (x.clamp(-self.limit, self.limit) + 1)


class LLaMAMoE(nn.Module):
    """Mixture of gated MLPs: every token goes through the `n_expert_per_token` best of them (arXiv:2401.04088), and through
    `n_shared_expert` more that all share (arXiv:2401.06066)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not 0 < config.n_expert_per_token <= config.n_expert:
            raise ValueError(
                f"a mixture of n_expert = {config.n_expert} experts, of which n_expert_per_token = "
                f"{config.n_expert_per_token} are used, cannot be built"
            )
        size = config.moe_intermediate_size or config.intermediate_size
        if config.n_expert_groups:
            self.gate = GroupedTopkRouter(config)
        else:
            self.gate = nn.Linear(config.n_embd, config.n_expert, bias=config.router_bias)
        expert = LLaMAMLP if config.swiglu_limit is None else ClampedMLP
        self.experts = Experts(expert(config, size) for _ in range(config.n_expert))
        if config.n_shared_expert:
            self.shared_experts = LLaMAMLP(config, size * config.n_shared_expert)
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        if self.config.n_expert_groups:
            weights, chosen = self.gate(flat)
        else:
            scores, chosen = torch.topk(self.gate(flat), self.config.n_expert_per_token)
            weights = scores.softmax(dim=-1, dtype=torch.float32)
        if self.config.routed_scaling_factor != 1.0:
            weights = weights * self.config.routed_scaling_factor
        y = self.experts(flat, weights, chosen).view_as(x)
        return y + self.shared_experts(x) if self.config.n_shared_expert else y


class Multiply(nn.Module):
    """Multiplication by a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv:1910.07467), computed in float32.

    Args:
        size: of the last dimension.
        dim: the dimension to norm over; only the last one.
        eps: added to the mean square.
        add_unit_offset: scale by 1 + weight, as Gemma does.
    """

    def __init__(self, size: int, dim: int = -1, eps: float = 1e-6, add_unit_offset: bool = False) -> None:
        super().__init__()
        if dim != -1:
            raise ValueError(f"RMSNorm works on the last dimension (dim=-1), got dim={dim}")
        self.weight = nn.Parameter(torch.zeros(size) if add_unit_offset else torch.ones(size))
        self.eps = eps
        self.add_unit_offset = add_unit_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if ops.can_norm(x, self.weight):
            return ops.rms_norm(x, self.weight, self.eps, float(self.add_unit_offset))
        if not self.add_unit_offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.add_unit_offset else 1.0)


def _first_position(input_pos: int | torch.Tensor, next_token_pos: int) -> int:
    """The first position; LitGPT's scripts give a tensor of consecutive ones."""
    if not isinstance(input_pos, torch.Tensor):
        if input_pos < 0:
            raise ValueError(f"input_pos must be None or at least 0, got {input_pos}")
        return int(input_pos)
    if torch.compiler.is_compiling():  # which must not read a tensor: what LitGPT's scripts mean is asserted
        first = next_token_pos if input_pos.numel() == 1 else 0
        torch._assert_async(
            input_pos.reshape(-1)[0] == first,
            "with a tensor input_pos, a compiled model starts a sequence or adds one token to it: give an int instead",
        )
        return first
    positions = input_pos.reshape(-1).tolist()
    if not positions or positions != list(range(positions[0], positions[0] + len(positions))):
        raise ValueError(f"input_pos must hold consecutive positions, got {positions[:8]}")
    return positions[0]


_MLP_CLASSES = {cls.__name__: cls for cls in (GptNeoxMLP, LLaMAMLP, GemmaMLP, LLaMAMoE)}


def _norm_class(config: Config) -> Callable[..., nn.Module]:
    if config.norm_class_name == "RMSNorm":
        return lambda size, eps: RMSNorm(size, eps=eps, add_unit_offset=config.norm_unit_offset)
    return lambda size, eps: nn.LayerNorm(size, eps=eps, elementwise_affine=config.norm_affine)


# `Config` does not import torch: the classes that it names are added here
Config.norm_class = property(_norm_class, doc="Makes the model's norms: `config.norm_class(size, eps=...)`.")
Config.mlp_class = property(lambda config: _MLP_CLASSES[config.mlp_class_name], doc="Class of the model's MLPs.")
