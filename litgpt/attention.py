"""Scaled dot-product attention as pure functions of tensors.

Letters: B batch rows, H query heads, G key/value heads ("query groups", H is a multiple of G), D head size, T queries,
N keys. Queries are (B, H, T, D), keys and values (B, G, N, D). Nothing here knows a cache, a policy or a slot: masks are
made from positions, and never for all T x N pairs of a long prompt at once.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from litgpt.config import Config
from litgpt.kernels import ops
from litgpt.keys_and_values import DefaultKeysAndValues as DefaultKeysAndValues
from litgpt.keys_and_values import EncodedKeysAndValues, both
from litgpt.keys_and_values import KeysAndValues as KeysAndValues
from litgpt.masks import Consecutive, Tile, position_bias, position_tiles
from litgpt.rope import yarn_get_mscale

SLOT_BLOCK = 1024  # encoded keys and values that are decoded at a time
SCORE_BLOCK_BYTES = 64 << 20  # eager attention keeps at most this many bytes of float32 scores at a time
# not cuDNN's, which are planned anew for every number of keys: some 60 ms in every decode step
GPU_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
DECODED_BYTES = 256 << 20  # on a GPU, of float32 numbers on the way from encoded keys and values, or of their scores


def _slots_with_room(numbers: int) -> int:
    """Slots, in whole blocks, for which there is room if each needs that many float32 numbers."""
    return max(1, DECODED_BYTES // (4 * numbers * SLOT_BLOCK)) * SLOT_BLOCK


def _slots_at_once(query: torch.Tensor, k_and_v: EncodedKeysAndValues) -> int:
    """Slots that are decoded at a time: more on a GPU, where launches take most of the time of a small block."""
    if not query.is_cuda:
        return SLOT_BLOCK
    decoded = query.shape[0] * k_and_v.n_query_groups * query.shape[-1]
    return _slots_with_room(3 * decoded)  # with the numbers that they are computed from


def do_softcapping(x: torch.Tensor, thresh: float | None) -> torch.Tensor:
    """Softcap scores to (-thresh, thresh) (Gemma 2, arXiv:2408.00118); `None` does not change them."""
    return x if thresh is None else torch.tanh(x / thresh) * thresh


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
        Output (B, H, T, D) in the query's dtype; weights (B, H, T, N), float32 or, for queries in float64, float64.
    """
    B, H, T, D = query.shape
    keys = k_and_v.keys()
    G, N = keys.shape[1], keys.shape[2]
    folded = query.reshape(B, G, H // G * T, D)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (folded @ keys.mT).to(exact).view(B, H, T, N) * scale
    scores = do_softcapping(scores, attention_logit_softcapping)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if sink_logits is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        weights = (scores - torch.logaddexp(scores.logsumexp(-1), sink_logits.to(exact)[:, None]).unsqueeze(-1)).exp()
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

    def has_plain_scores(self) -> bool:
        """Whether any kernel may be used, also one that knows no softcap."""
        return self.is_plain() and self.softcapping is None

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
            y = self._attend_fused(query, *both(k_and_v), bias, is_causal, sink_logits)
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
        size = min(at_once, _slots_with_room(B * H * T))
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
            keys, values = both(k_and_v)
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
        keys, values = both(k_and_v)
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
            k_and_v = DefaultKeysAndValues(*both(k_and_v))
        for tile in tiles:
            part, own = k_and_v, query
            if (tile.k0, tile.k1) != (0, N) and encoded:
                part = k_and_v.narrow(tile.k0, tile.k1)
            elif (tile.k0, tile.k1) != (0, N):
                part = DefaultKeysAndValues(*(x[:, :, tile.k0 : tile.k1] for x in both(k_and_v)))
            if len(tiles) > 1:
                own = query[:, :, tile.q0 : tile.q1]
            output, weights = self.attend(own, part, tile.bias, tile.is_causal, return_weights, sink_logits)
            outputs.append(output)
            if return_weights:
                summed = weights.new_zeros(B, H, N) if summed is None else summed
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
            positions = torch.arange(first, first + T, device=query.device)
            tiles = position_tiles(positions, token_positions, H, window, query.dtype)
            output, summed = self._attend_tiles(query, k_and_v, tiles, return_attn_weights, sink_logits)
        return output.transpose(1, 2).flatten(2), summed
