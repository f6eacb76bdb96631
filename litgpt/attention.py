"""Scaled dot-product attention as pure functions of tensors.

Letters: B batch rows, H query heads, G key/value heads ("query groups", H is a multiple of G), D head size, T queries,
N keys. Queries are (B, H, T, D), keys and values (B, G, N, D). Nothing here knows a cache, a policy or a slot: masks are
made from positions, and never for all T x N pairs of a long prompt at once.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from litgpt.config import Config
from litgpt.kernels import ops
from litgpt.kernels.structs import Vectors
from litgpt.rope import yarn_get_mscale

QUERY_BLOCK = 512  # queries per tile where a mask is needed; bounds the mask at QUERY_BLOCK x N
SLOT_BLOCK = 1024  # encoded keys and values that are decoded at a time
DECODED_SLOTS = 256  # of them at once in float32, on a CPU
SCORE_BLOCK_BYTES = 64 << 20  # eager attention keeps at most this many bytes of float32 scores at a time
# not cuDNN's, which are planned anew for every number of keys: some 60 ms in every decode step
GPU_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
DECODED_BYTES = 256 << 20  # on a GPU, of float32 numbers on the way from encoded keys and values, or of their scores


class KeysAndValues(Protocol):
    """Access to the keys and values that queries attend to, both (B, G, N, D)."""

    def keys(self) -> torch.Tensor: ...

    def values(self) -> torch.Tensor: ...

    def both_in_parallel(self) -> bool:
        """False if `values` may overwrite the result of `keys` (a storage that decodes into one shared buffer)."""
        ...


class DefaultKeysAndValues:
    """Keys and values as plain tensors."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:-1] != values.shape[:-1]:
            raise ValueError(
                f"keys and values must be (B, G, N, D) with equal B, G and N; got {tuple(keys.shape)} and "
                f"{tuple(values.shape)}"
            )
        self._keys, self._values = keys, values

    def keys(self) -> torch.Tensor:
        return self._keys

    def values(self) -> torch.Tensor:
        return self._values

    def both_in_parallel(self) -> bool:
        return True


class VectorCodec(Protocol):
    """How vectors are encoded, each on its own: see `litgpt.kvcache.storages.codecs`."""

    kind: int
    rotated: bool
    parts: dict[str, Any]

    def decode(self, *parts: torch.Tensor) -> torch.Tensor: ...

    def rotate(self, x: torch.Tensor) -> torch.Tensor: ...


class EncodedKeysAndValues:
    """Keys and values as numbers of fewer bits, which are decoded when they are asked for: all, or a range of them.

    Args:
        codecs: of keys and values, or of keys alone.
        parts: what the codecs made, all (B, G, N, ...), those of keys first.
        dtype: of keys and values.
        value_size: where there is no codec of values: they are the first that many numbers of the keys.
    """

    def __init__(
        self,
        codecs: Sequence[VectorCodec],
        parts: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        value_size: int | None = None,
    ) -> None:
        self.codecs, self.parts, self.dtype, self.value_size = codecs, parts, dtype, value_size

    def keys(self) -> torch.Tensor:
        return self._in_blocks(lambda block: self.codecs[0].rotate(block._decode(0)))

    def values(self) -> torch.Tensor:
        if len(self.codecs) == 1:
            return self.keys()[..., : self.value_size]
        return self._in_blocks(lambda block: self.codecs[1].rotate(block._decode(1)))

    def both_in_parallel(self) -> bool:
        return True

    def _in_blocks(self, decode: Callable[["EncodedKeysAndValues"], torch.Tensor]) -> torch.Tensor:
        """What `decode` makes, on a CPU of few slots at a time: the numbers on the way then take little memory."""
        N, size = self.length, DECODED_SLOTS
        if N <= size or self.parts[0].device.type != "cpu" or torch.compiler.is_compiling():
            return decode(self).to(self.dtype)
        first = decode(self.narrow(0, size))
        found = first.new_empty((*first.shape[:2], N, first.shape[3]), dtype=self.dtype)
        found[:, :, :size] = first
        for start in range(size, N, size):
            found[:, :, start : start + size] = decode(self.narrow(start, start + size))
        return found

    def _decode(self, side: int) -> torch.Tensor:
        first = len(self.codecs[0].parts)
        return self.codecs[side].decode(*(self.parts[first:] if side else self.parts[:first]))

    def expected_errors(self) -> tuple[torch.Tensor, ...]:
        """The norms of what keys and values have lost, as their scales let expect, (B, G, N) each."""
        first = len(self.codecs[0].parts)
        parts = self.parts[:first], self.parts[first:]
        return tuple(codec.expected_error(*own) for codec, own in zip(self.codecs, parts, strict=False))

    @property
    def length(self) -> int:
        """N."""
        return self.parts[0].shape[2]

    @property
    def n_query_groups(self) -> int:
        """G."""
        return self.parts[0].shape[1]

    def narrow(self, start: int, stop: int) -> "EncodedKeysAndValues":
        """Those from `start` up to `stop`."""
        return self._with(tuple(x[:, :, start:stop] for x in self.parts))

    def rotated(self) -> DefaultKeysAndValues:
        """Keys and values as they are encoded: rotated where the codecs rotate."""
        keys = self._in_blocks(lambda block: block._decode(0))
        if len(self.codecs) == 1:
            return DefaultKeysAndValues(keys, keys[..., : self.value_size])
        return DefaultKeysAndValues(keys, self._in_blocks(lambda block: block._decode(1)))

    def for_kernels(self) -> tuple[Vectors, ...]:
        """What `litgpt.kernels` read, by addresses: good as long as this lives. Their kind is 0 where they do not."""
        codes, scales = self.parts[::2], self.parts[1::2]
        kinds = [codec.kind if x.stride(-1) == 1 else 0 for codec, x in zip(self.codecs, codes, strict=True)]
        rotated = (codec.rotated for codec in self.codecs)
        return tuple(map(Vectors.of, kinds, rotated, codes, scales))

    def newest(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """Keys and values that are not encoded, and how many others come first: for kernels, which find that at position p in slot p
        modulo the number of slots. None: all are encoded."""
        return None

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        """Queries for rotated keys."""
        return self.codecs[0].rotate(query)

    def rotate_output(self, output: torch.Tensor) -> torch.Tensor:
        """What sums of rotated values are sums of."""
        return output if len(self.codecs) == 1 else self.codecs[1].rotate(output)

    def _with(self, parts: tuple[torch.Tensor, ...]) -> "EncodedKeysAndValues":
        return EncodedKeysAndValues(self.codecs, parts, self.dtype, self.value_size)


def join(first: KeysAndValues, second: KeysAndValues) -> KeysAndValues:
    """The keys and values of both, one after the other."""
    if isinstance(first, EncodedKeysAndValues) and isinstance(second, EncodedKeysAndValues):
        return first._with(tuple(torch.cat(pair, dim=2) for pair in zip(first.parts, second.parts, strict=True)))
    return DefaultKeysAndValues(
        torch.cat((first.keys(), second.keys()), dim=2), torch.cat((first.values(), second.values()), dim=2)
    )


def _together(k_and_v: KeysAndValues) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that can be used at the same time."""
    keys = k_and_v.keys()
    return keys if k_and_v.both_in_parallel() else keys.clone(), k_and_v.values()


def _slots_at_once(query: torch.Tensor, k_and_v: EncodedKeysAndValues) -> int:
    """Slots that are decoded at a time: more on a GPU, where launches take most of the time of a small block."""
    if not query.is_cuda:
        return SLOT_BLOCK
    numbers = (
        3 * query.shape[0] * k_and_v.n_query_groups * query.shape[-1]
    )  # numbers, and the parts that they come from
    return max(1, DECODED_BYTES // (4 * numbers * SLOT_BLOCK)) * SLOT_BLOCK


def _slots_of_scores(slots: int, query: torch.Tensor) -> int:
    """At most `slots`, as many as have room for scores of all queries (B, H, T, D)."""
    return min(slots, max(1, DECODED_BYTES // (4 * query.shape[:3].numel() * SLOT_BLOCK)) * SLOT_BLOCK)


def do_softcapping(x: torch.Tensor, thresh: float | None) -> torch.Tensor:
    """Softcap scores to (-thresh, thresh) (Gemma 2, arXiv:2408.00118); `None` does not change them."""
    return x if thresh is None else torch.tanh(x / thresh) * thresh


class PositionMask:
    """The mask of `position_bias` for these arguments, made when it is first needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._arguments = args, kwargs

    @cached_property
    def bias(self) -> torch.Tensor:
        args, kwargs = self._arguments
        return position_bias(*args, **kwargs)


class Tile(NamedTuple):
    """One attention call: queries [q0, q1) over keys [k0, k1), with an additive `bias` or the causal flag."""

    q0: int
    q1: int
    k0: int
    k1: int
    bias: torch.Tensor | None
    is_causal: bool


def position_bias(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    reach: int | None = None,
    n_sink: int = 0,
) -> torch.Tensor:
    """Additive mask (..., T, N) from positions (..., T) and (..., N): 0 where a query sees a key, -inf elsewhere.

    A query at p sees keys at 0..p (negative positions mark empty slots), but only the last `window` of them, and with `reach`
    only the last `reach` and the first `n_sink` of the sequence.
    """
    query, key = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible &= key > query - window
    if reach is not None:
        visible &= (key > query - reach) | (key < n_sink)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def causal_tiles(T: int, N: int, window: int | None, dtype: torch.dtype, device: torch.device) -> list[Tile]:
    """Tiles for T queries that are the last of N consecutive positions, each seeing the last `window` (None: all) keys.

    Rows and columns of every tile's mask are cut from one band of QUERY_BLOCK x N (or x window), so memory grows with N,
    not with T x N.
    """
    if window is not None and window >= N:
        window = None
    if T == 1:
        return [Tile(0, 1, 0 if window is None else N - window, N, None, False)]
    if T == N and window is None:
        return [Tile(0, T, 0, N, None, True)]
    rows = min(QUERY_BLOCK, T)
    columns = N if window is None else min(N, rows + window - 1)
    last = torch.arange(columns, device=device)
    band = position_bias(last[columns - rows :], last, dtype, window=window)
    tiles = []
    for q0 in range(0, T, rows):
        q1 = min(q0 + rows, T)
        k1 = N - T + q1
        k0 = 0 if window is None else max(0, k1 - (q1 - q0) - window + 1)
        tiles.append(Tile(q0, q1, k0, k1, band[rows - (q1 - q0) :, columns - (k1 - k0) :], False))
    return tiles


class Consecutive:
    """T queries at the last of N consecutive positions, each seeing the last `window` keys (None: all) up to its own.

    Masks are made in `dtype` on `device`.
    """

    def __init__(self, T: int, N: int, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self.T, self.N, self.window = T, N, window
        self._form = dtype, device
        self._tiles: list[Tile] | None = None

    @property
    def tiles(self) -> list[Tile]:
        """The tiles of `causal_tiles`, made on first use."""
        if self._tiles is None:
            self._tiles = causal_tiles(self.T, self.N, self.window, *self._form)
        return self._tiles


def scaled_dot_product_attention(
    query: torch.Tensor,
    k_and_v: KeysAndValues,
    scale: float,
    mask: torch.Tensor | None = None,
    attention_logit_softcapping: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, with every weight returned.

    Args:
        query: (B, H, T, D).
        k_and_v: keys and values (B, G, N, D).
        scale: factor on the query-key products.
        mask: additive float or boolean (True: attend) mask, broadcastable to (B, H, T, N).
        attention_logit_softcapping: threshold for `do_softcapping`, applied before the mask.
        sink_logits: (H,), for each head the score of an additional key in the softmax without a value (GPT-OSS).

    Returns:
        Output (B, H, T, D) in the query's dtype; weights (B, H, T, N), float32.
    """
    B, H, T, D = query.shape
    keys = k_and_v.keys()
    G, N = keys.shape[1], keys.shape[2]
    folded = query.reshape(B, G, H // G * T, D)
    scores = (folded @ keys.mT).float().view(B, H, T, N) * scale
    scores = do_softcapping(scores, attention_logit_softcapping)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if sink_logits is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        weights = (scores - torch.logaddexp(scores.logsumexp(-1), sink_logits.float()[:, None]).unsqueeze(-1)).exp()
    values = k_and_v.values()
    output = weights.to(values.dtype).view(B, G, H // G * T, N) @ values
    return output.view(B, H, T, values.shape[-1]), weights


def attention_scale(config: Config) -> float:
    """Factor on query-key products, with latent attention including YaRN's factor."""
    if config.latent_attention is None:
        return 1.0 / math.sqrt(config.attention_scores_scalar or config.head_size)
    adjustments = config.rope_adjustments or {}
    mscale = yarn_get_mscale(adjustments.get("factor", 1.0), adjustments.get("mscale_all_dim", 0.0))
    return mscale**2 / math.sqrt(config.attention_scores_scalar or config.qk_head_dim)


class MultiHeadSelfAttention:
    """Causal attention with a configuration's scale, softcap and sliding windows.

    Args:
        config: the model's configuration.
        sdpa_kernels: torch's kernels to choose from (default: all, and those of `litgpt.kernels`).
        use_eager_sdpa_always: write attention out instead of calling a fused kernel.
    """

    def __init__(
        self,
        config: Config,
        sdpa_kernels: SDPBackend | Sequence[SDPBackend] | None = None,
        use_eager_sdpa_always: bool = False,
    ) -> None:
        self.config = config
        self.scale = attention_scale(config)
        self.softcapping = config.attention_logit_softcapping
        self.sdpa_kernels = [sdpa_kernels] if isinstance(sdpa_kernels, SDPBackend) else sdpa_kernels
        self.use_eager_sdpa_always = use_eager_sdpa_always
        # of keys shared by all heads and longer than values: a fused kernel would copy them for every head
        self.shared_key_size = None if config.latent_attention is None else config.cache_head_size

    def is_plain(self) -> bool:
        """Whether any kernel may be used."""
        return self.sdpa_kernels is None and not self.use_eager_sdpa_always

    def has_plain_scores(self, block_idx: int) -> bool:
        """Whether any kernel may be used in that layer, also one that knows neither softcap nor window."""
        return self.is_plain() and self.softcapping is None and self.config.window(block_idx) is None

    def attend(
        self,
        query: torch.Tensor,
        k_and_v: KeysAndValues,
        bias: torch.Tensor | None,
        is_causal: bool,
        return_weights: bool = False,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention, by a fused kernel if possible, otherwise written out in blocks of queries.

        Args:
            query: (B, H, T, D).
            k_and_v: keys and values (B, G, N, D).
            bias: additive mask broadcastable to (B, H, T, N), in the query's dtype.
            is_causal: query t sees keys 0..t; needs T == N and no bias.
            return_weights: also return the weights, summed over the T queries.
            sink_logits: (H,), as for `scaled_dot_product_attention`.

        Returns:
            Output (B, H, T, D); weights (B, H, N) in float32, or None.
        """
        if isinstance(k_and_v, EncodedKeysAndValues):
            if return_weights or is_causal or self.use_eager_sdpa_always:
                k_and_v = DefaultKeysAndValues(k_and_v.keys(), k_and_v.values())
            else:
                return self._attend_encoded(query, k_and_v, bias, sink_logits), None
        y = None
        if not (self.use_eager_sdpa_always or return_weights or query.shape[-1] == self.shared_key_size):
            y = self._attend_fused(query, *_together(k_and_v), bias, is_causal, sink_logits)
        if y is not None:
            return y, None
        return self._attend_eager(query, k_and_v, bias, is_causal, return_weights, sink_logits)

    def _attend_fused(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        is_causal: bool,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Output (B, H, T, D) of a fused kernel; None if there is none for these arguments."""
        if bias is not None and bias.ndim == 2:
            bias = bias[None, None]
        factors = self.scale, self.softcapping or 0.0
        if self.is_plain():
            if (not is_causal or query.shape[2] == 1) and ops.can_attend(query, keys, values, bias, sink_logits):
                run = torch.ops.litgpt.attend if torch.compiler.is_compiling() else ops.attend
                return run(query, keys, values, bias, sink_logits, *factors).transpose(1, 2)
            if is_causal and ops.can_attend_causally(query, keys, values, sink_logits):
                return ops.attend_causally(query, keys, values, sink_logits, None, *factors).transpose(1, 2)
        if self.softcapping is not None or sink_logits is not None:
            return None
        grouped, shape = query.shape[1] != keys.shape[1], (*query.shape[:3], values.shape[-1])
        one, alike = query.shape[2] == 1, bias is None or bias.shape[1] == 1
        if grouped and alike and (one or (query.is_cuda and not is_causal)):
            # the heads of a group see the same keys: as rows of one product they read them once; and on a GPU no kernel but the
            # slowest has both groups and a mask
            if bias is not None and bias.shape[2] > 1:
                bias = bias.repeat(1, 1, query.shape[1] // keys.shape[1], 1)
            query, grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1]), False
        with self._kernels_for(query):
            return F.scaled_dot_product_attention(
                query, keys, values, attn_mask=bias, is_causal=is_causal, scale=self.scale, enable_gqa=grouped
            ).reshape(shape)

    def _kernels_for(self, query: torch.Tensor) -> AbstractContextManager[None]:
        """Where torch chooses among its kernels that may be used."""
        kernels = self.sdpa_kernels
        if kernels is None and query.is_cuda and not torch.compiler.is_compiling():
            kernels = GPU_KERNELS
        return nullcontext() if kernels is None else sdpa_kernel(list(kernels))

    def _attend_encoded(
        self,
        query: torch.Tensor,
        k_and_v: EncodedKeysAndValues,
        bias: torch.Tensor | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """`attend` to encoded keys and values, of which some are decoded at a time (online softmax)."""
        N, at_once = k_and_v.length, _slots_at_once(query, k_and_v)
        if bias is not None and bias.ndim == 2:
            bias = bias[None, None]
        if query.device.type == "cpu" and self.is_plain() and not torch.compiler.is_compiling():
            encoded = k_and_v.for_kernels()
            if ops.can_attend_encoded(query, encoded, bias, sink_logits):
                args = k_and_v.n_query_groups, N, bias, sink_logits, self.scale, self.softcapping or 0.0
                return ops.attend_encoded(query, encoded, *args, k_and_v.newest()).transpose(1, 2)
        own = k_and_v.rotate_query(query)
        if N <= at_once or torch.compiler.is_compiling():  # compiled code is to be the same for any length
            return k_and_v.rotate_output(self.attend(own, k_and_v.rotated(), bias, False, sink_logits=sink_logits)[0])
        B, H, T, D = query.shape
        top = query.new_full((B, H, T), -math.inf, dtype=torch.float32)
        total = torch.zeros_like(top)
        output: torch.Tensor | float = 0.0
        if sink_logits is not None:
            top, total = sink_logits.float()[:, None].expand(B, H, T), torch.ones_like(top)
        size = _slots_of_scores(at_once, query)
        for start in range(0, N, size):
            block = k_and_v.narrow(start, start + size).rotated()
            keys, values = block.keys(), block.values()
            G, n = keys.shape[1:3]
            scores = (own.reshape(B, G, -1, D) @ keys.mT).float().view(B, H, T, n) * self.scale
            scores = do_softcapping(scores, self.softcapping)
            if bias is not None:
                scores = scores + bias[..., start : start + size]
            most = torch.maximum(top, scores.detach().amax(-1))
            base = most.masked_fill(most == -math.inf, 0.0)
            weights, factor = (scores - base[..., None]).exp(), (top - base).exp()
            total = total * factor + weights.sum(-1)
            sums = weights.to(values.dtype).view(B, G, -1, n) @ values
            output = output * factor[..., None] + sums.view(B, H, T, -1)
            top = most
        return k_and_v.rotate_output((output / total[..., None]).to(query.dtype))

    def _attend_eager(
        self,
        query: torch.Tensor,
        k_and_v: KeysAndValues,
        bias: torch.Tensor | None,
        is_causal: bool,
        return_weights: bool,
        sink_logits: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`attend`, written out in blocks of queries."""
        B, H, T, _ = query.shape
        rows = max(1, min(T, SCORE_BLOCK_BYTES // (4 * B * H * k_and_v.keys().shape[2])))
        positions = torch.arange(T, device=query.device) if is_causal else None
        outputs, summed = [], None
        for start in range(0, T, rows):
            block, part = slice(start, start + rows), bias
            if is_causal:
                part = position_bias(positions[block], positions, query.dtype)
            elif bias is not None and bias.shape[-2] > 1:
                part = bias[..., block, :]
            output, weights = scaled_dot_product_attention(
                query[:, :, block], k_and_v, self.scale, part, self.softcapping, sink_logits
            )
            outputs.append(output)
            if return_weights:
                summed = weights.sum(2) if summed is None else summed + weights.sum(2)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), summed

    def attend_consecutive(
        self,
        query: torch.Tensor,
        k_and_v: KeysAndValues,
        consecutive: Consecutive,
        return_weights: bool = False,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`attend` for T queries among N consecutive positions: by one kernel if possible, else tile by tile."""
        T = consecutive.T
        # few queries, e.g. draft tokens, get bitwise the outputs of single queries
        encoded = isinstance(k_and_v, EncodedKeysAndValues)
        alike = not encoded and query.shape[-1] != self.shared_key_size
        if T > ops.MAX_QUERIES and not return_weights and self.is_plain() and alike:
            keys, values = _together(k_and_v)
            if ops.can_attend_causally(query, keys, values, sink_logits):
                y = ops.attend_causally(
                    query, keys, values, sink_logits, consecutive.window, self.scale, self.softcapping or 0.0
                )
                return y.transpose(1, 2), None
        if query.is_cuda and 1 < T < consecutive.N and not return_weights and sink_logits is None:
            y = self._attend_lower_right(query, k_and_v, consecutive)
            if y is not None:
                return y, None
        return self._attend_tiles(query, k_and_v, consecutive.tiles, return_weights, sink_logits)

    def _attend_lower_right(
        self, query: torch.Tensor, k_and_v: KeysAndValues, consecutive: Consecutive
    ) -> torch.Tensor | None:
        """Output (B, H, T, D) of a GPU's kernel that masks by itself; None if it is not for these arguments."""
        from torch.nn.attention.bias import causal_lower_right  # loads compilers, which take a second

        T, N, window = consecutive.T, consecutive.N, consecutive.window
        if not self.is_plain() or self.softcapping is not None or (window is not None and window < N):
            return None
        if isinstance(k_and_v, EncodedKeysAndValues):
            if N > _slots_at_once(query, k_and_v):
                return None
            y = self._attend_lower_right(k_and_v.rotate_query(query), k_and_v.rotated(), consecutive)
            return None if y is None else k_and_v.rotate_output(y)
        keys, values = _together(k_and_v)
        grouped = query.shape[1] != keys.shape[1]
        if query.shape[-1] != values.shape[-1] or not can_use_flash_attention(
            SDPAParams(query, keys, values, None, 0.0, True, grouped)
        ):
            return None
        mask = causal_lower_right(T, N)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=grouped)

    def _attend_tiles(
        self,
        query: torch.Tensor,
        k_and_v: KeysAndValues,
        tiles: Sequence[Tile],
        return_weights: bool,
        sink_logits: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`attend` tile by tile; the tiles cover all queries in order."""
        B, H = query.shape[:2]
        encoded = isinstance(k_and_v, EncodedKeysAndValues)
        N = k_and_v.length if encoded else k_and_v.keys().shape[2]
        outputs, summed = [], None
        if len(tiles) > 1 and not encoded:
            k_and_v = DefaultKeysAndValues(*_together(k_and_v))
        for tile in tiles:
            part, own = k_and_v, query
            if (tile.k0, tile.k1) != (0, N) and encoded:
                part = k_and_v.narrow(tile.k0, tile.k1)
            elif (tile.k0, tile.k1) != (0, N):
                part = DefaultKeysAndValues(*(x[:, :, tile.k0 : tile.k1] for x in _together(k_and_v)))
            if len(tiles) > 1:
                own = query[:, :, tile.q0 : tile.q1]
            output, weights = self.attend(own, part, tile.bias, tile.is_causal, return_weights, sink_logits)
            outputs.append(output)
            if return_weights:
                summed = torch.zeros(B, H, N, device=query.device) if summed is None else summed
                summed[:, :, tile.k0 : tile.k1] += weights
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), summed

    def __call__(
        self,
        query: torch.Tensor,
        k_and_v: KeysAndValues,
        block_idx: int,
        input_pos: int | None = None,
        return_attn_weights: bool = False,
        token_positions: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend causally in layer `block_idx`.

        Args:
            query: (B, H, T, D), the queries of T consecutive tokens.
            k_and_v: keys and values (B, G, N, D).
            block_idx: the layer, which decides about a sliding window.
            input_pos: position of the first query. None or 0: the keys are of the same T tokens.
            return_attn_weights: also return the weights summed over the T queries.
            token_positions: position of every key, (B, G, N), negative for none. Default: 0..N-1.
            sink_logits: (H,), as for `scaled_dot_product_attention`.

        Returns:
            Output (B, T, H * D); weights (B, H, N) in float32, or None.

        Raises:
            ValueError: for inconsistent shapes or positions.
        """
        B, H, T, _ = query.shape
        G, N = k_and_v.keys().shape[1:3]
        first = input_pos or 0
        if H % G:
            raise ValueError(f"{H} query heads cannot share {G} key/value heads")
        if token_positions is None and first + T != N:
            raise ValueError(
                f"{N} keys for queries at positions {first} to {first + T - 1}: expected {first + T} keys, or token_positions"
            )
        window = self.config.window(block_idx)
        if token_positions is None:
            consecutive = Consecutive(T, N, window, query.dtype, query.device)
            output, summed = self.attend_consecutive(query, k_and_v, consecutive, return_attn_weights, sink_logits)
        else:
            if tuple(token_positions.shape) != (B, G, N):
                raise ValueError(f"token_positions must be {(B, G, N)}, got {tuple(token_positions.shape)}")
            tiles = self._tiles_by_position(query, token_positions, first, window)
            output, summed = self._attend_tiles(query, k_and_v, tiles, return_attn_weights, sink_logits)
        return output.transpose(1, 2).flatten(2), summed

    @staticmethod
    def _tiles_by_position(
        query: torch.Tensor, token_positions: torch.Tensor, first: int, window: int | None
    ) -> list[Tile]:
        H, T = query.shape[1:3]
        G, N = token_positions.shape[1:]
        queries = torch.arange(first, first + T, device=query.device)
        tiles = []
        for q0 in range(0, T, QUERY_BLOCK):
            q1 = min(q0 + QUERY_BLOCK, T)
            bias = position_bias(queries[q0:q1], token_positions, query.dtype, window=window)
            tiles.append(Tile(q0, q1, 0, N, bias.repeat_interleave(H // G, dim=1), False))
        return tiles
