"""Rotary position embedding (arXiv:2104.09864): frequencies, tables of cosines and sines, and the rotation itself."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from litgpt.config import Config
from litgpt.device_tensor import device_tensor
from litgpt.kernels import training

Rope = tuple[torch.Tensor, torch.Tensor]


class RopeTable:
    """A model's table of cosines and sines, float32, which grows as needed; with LongRoPE for the factors in use.

    Attributes:
        cos, sin: of positions 0 to `length` - 1, as made by `build_rope_cache`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.short_context = short_context(config.rope_adjustments)
        self.cos = self.sin = torch.empty(0, config.rope_n_elem)
        self._long = False  # whether it has the long factors
        self._tables: list[Rope] = []  # the table in the layers' format and dtype, (1, 1, positions, n)
        self._tables_of: torch.Tensor | None = None  # the cosines that it was made of

    @property
    def length(self) -> int:
        """Positions that the table covers."""
        return self.cos.shape[0]

    def needs_long(self, length: int) -> bool:
        """Whether LongRoPE rotates sequences of that length by its long factors."""
        return self.short_context is not None and length > self.short_context

    def build(self, length: int, device: torch.device | None = None) -> Rope:
        """Cosines and sines of that many positions."""
        config = self.config
        with torch.inference_mode(False):  # the table outlives the call that makes it
            return build_rope_cache(
                length,
                config.rope_n_elem,
                device=device,
                base=config.rope_base,
                condense_ratio=config.rope_condense_ratio,
                extra_config=config.rope_adjustments,
                rope_local_base_freq=config.rope_local_base_freq,
                long=self._long,
            )

    def cover(self, length: int, device: torch.device, long: bool | None = None, room: int | None = None) -> None:
        """Ensure that the table covers `length` positions on the device, by LongRoPE's long factors or not (None: as before);
        otherwise rebuild it for `room` positions (default: `length`)."""
        long = self._long if long is None else long
        if length > self.length or self.cos.device != device or long != self._long:
            self._long = long
            self.cos, self.sin = self.build(length if room is None else room, device)

    def rows(
        self,
        start: int | Sequence[int],
        T: int | Sequence[int],
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        long: bool = False,
    ) -> list[Rope]:
        """Cosines and signed sines for T tokens from position `start` (one, or one for every row) on. If T is given for every
        row too, the rows are concatenated.

        Args:
            max_length: of the model's sequences.
            dtype, device: of the result.
            long: use LongRoPE's long factors.

        Returns:
            Contiguous pairs of (B or 1, 1, T, rope_n_elem), one for each kind of layer.
        """
        if isinstance(start, int):
            stop = start + T
        else:
            stop = max(map(sum, zip(start, [T] * len(start) if isinstance(T, int) else T, strict=True)))
        # twice the required length, so that a sequence that grows token by token seldom needs a larger table
        self.cover(stop, device, long, 2 * stop if stop > max_length else min(max_length, 2 * stop))
        if self._tables_of is not self.cos or self._tables[0][0].dtype != dtype:
            with torch.inference_mode(False):
                self._tables = _signed(self.cos.to(dtype), self.sin.to(dtype), self.config.rope_n_elem)
                self._tables_of = self.cos
        if isinstance(start, int):
            return [(cos.narrow(2, start, T), sin.narrow(2, start, T)) for cos, sin in self._tables]
        if isinstance(T, int):
            positions = device_tensor(list(start), device)[:, None] + torch.arange(T, device=device)
        else:
            spans = zip(start, T, strict=True)
            positions = torch.cat([torch.arange(a, a + size, device=device) for a, size in spans])[None]
        positions = positions.unsqueeze(1)
        return [(cos[0, 0, positions], sin[0, 0, positions]) for cos, sin in self._tables]


def _signed(cos: torch.Tensor, sin: torch.Tensor, n: int) -> list[Rope]:
    """Cosines and sines (1, 1, positions, n) in the format of `rotate`, from one table or several in the last dimension."""
    if cos.ndim == 2:
        cos, sin = cos.unsqueeze(-1), sin.unsqueeze(-1)
    if n == 1:  # LitGPT and transformers duplicate it, so it counts twice in the product of query and key
        cos, sin = cos[:, :1] * 2**0.5, sin[:, :1] * 2**0.5
    left, right = sin.split((n - n // 2, n // 2), dim=1)
    sin = torch.cat((-left, right), dim=1)
    tables = [[x.contiguous()[:, None, None].transpose(0, 2) for x in both.unbind(-1)] for both in (cos, sin)]
    return list(zip(*tables, strict=True))  # the number of positions is in no stride: compiled code would notice


def rotate(x: torch.Tensor, rope: Rope | None, interleave: bool = False) -> torch.Tensor:
    """Apply RoPE to the first n elements of x (B, heads, T, D). Rotated pairs are (i, i + n/2), or with `interleave` neighbours,
    which are then reordered into halves.

    `rope` holds cosines and sines, (B or 1, 1, T, n) each, the first half of the sines negated, so that a rotation is one
    multiplication, one roll and one addcmul. `None` returns x, for layers without RoPE.
    """
    if rope is None:
        return x
    if not interleave and training.can_rotate(x, *rope):
        return training.rotate(x, *rope)
    n = rope[0].shape[-1]
    head = x if n == x.shape[-1] else x[..., :n]
    if interleave:
        head = head.unflatten(-1, (-1, 2)).mT.flatten(-2)
    rotated = torch.addcmul(head * rope[0], head.roll(-(n // 2), -1), rope[1])
    return rotated if n == x.shape[-1] else torch.cat((rotated, x[..., n:]), dim=-1)


def layer_rope(rope: list[Rope] | torch.Tensor, plan: Any) -> tuple[list[Rope], Any]:
    """A layer's arguments, also from LitGPT's: cosines and sines (B, T, n) instead of tables and a cache's plan."""
    if not isinstance(rope, torch.Tensor):
        return rope, plan
    n = rope.shape[-1]
    left, right = plan.split((n - n // 2, n // 2), dim=-1)
    return [(rope.unsqueeze(1), torch.cat((-left, right), dim=-1).unsqueeze(1))], None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, ..., T, n) by the angles whose cosines and sines are `cos`, `sin` (T, n) or (B, T, n).

    A single element comes back as two equal ones, for which `build_rope_cache` has two columns.
    """
    if cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must have the same shape")
    if cos.ndim == 3:
        batch = (-1, *[1] * (x.ndim - 3), *cos.shape[1:])
        cos, sin = cos.view(batch), sin.view(batch)
    half = x.shape[-1] // 2
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin).to(x.dtype)


def apply_rope_interleave(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rope` for x whose rotated pairs are neighbours, reordered into halves (which leaves query-key products equal)."""
    return apply_rope(x.unflatten(-1, (-1, 2)).mT.flatten(-2), cos, sin)


def build_rope_cache(
    seq_len: int,
    n_elem: int,
    device: torch.device | None = None,
    base: int = 10000,
    condense_ratio: int = 1,
    extra_config: dict[str, Any] | None = None,
    rope_local_base_freq: float | None = None,
    long: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of RoPE's angles for positions 0..seq_len - 1.

    Args:
        seq_len: positions.
        n_elem: rotated elements of a head.
        device: where to make them.
        base: of the geometric series of wave lengths.
        condense_ratio: positions are divided by it.
        extra_config: `Config.rope_adjustments`, a scaling, identified by its keys: {factor} is linear; with low_freq_factor,
            high_freq_factor and original_max_seq_len it is Llama 3.1's; with beta_fast, beta_slow and
            original_max_seq_len YaRN; with short_factor, long_factor, factor and original_max_seq_len LongRoPE.
        rope_local_base_freq: a second base, for layers with a sliding window (Gemma 3).
        long: for LongRoPE, whether the sequence is longer than its original_max_seq_len (default: whether seq_len is).

    Returns:
        Cosines and sines, (seq_len, n_elem) or, with a second base, (seq_len, n_elem, 2), float32. YaRN and LongRoPE
        multiply them by their attention factor. A single element has two equal columns, as in LitGPT and `transformers`.
    """
    exponents = torch.arange(0, n_elem, 2, device=device).float() / max(n_elem, 1)
    theta = 1.0 / base**exponents
    scale: float | torch.Tensor = 1.0
    if extra_config is not None:
        if long is None:
            long = seq_len > extra_config.get("original_max_seq_len", seq_len)
        theta = _scaled(theta, extra_config, n_elem, base, long)
        scale = attention_factor(extra_config)
    if rope_local_base_freq is not None:
        theta = torch.stack((theta, 1.0 / rope_local_base_freq**exponents), dim=-1)
        scale = torch.tensor([scale, 1.0], dtype=theta.dtype, device=device)  # the layers with a window have no scaling
    positions = torch.arange(seq_len, device=device).float() / condense_ratio
    angles = positions.view(-1, *[1] * theta.ndim) * theta
    angles = torch.cat((angles, angles), dim=1)
    if n_elem > 1:
        angles = angles[:, :n_elem]  # of an odd number, the last one's partner is left out
    return angles.cos() * scale, angles.sin() * scale


def layer_frequencies(config: Config, block_idx: int, device: torch.device) -> torch.Tensor:
    """The angles by which a layer rotates the pairs of a head from one position to the next, (n,) float32; empty where it has no
    RoPE. With LongRoPE, by the short factors."""
    if config.nope_indices is not None and config.nope_indices[block_idx]:
        return torch.empty(0, dtype=torch.float32, device=device)
    local = config.rope_local_base_freq is not None and config.rope_indices[block_idx]
    exponents = torch.arange(0, config.rope_n_elem, 2, device=device).float() / max(config.rope_n_elem, 1)
    theta = 1.0 / (config.rope_local_base_freq if local else config.rope_base) ** exponents
    if config.rope_adjustments is not None and not local:
        theta = _scaled(theta, config.rope_adjustments, config.rope_n_elem, config.rope_base, False)
    return theta / config.rope_condense_ratio


def rotate_by(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first pairs (i, i + n) of x (..., D) by angles whose cosines and sines are (..., n)."""
    n = cos.shape[-1]
    a, b, rest = x.split((n, n, x.shape[-1] - 2 * n), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def unrotate(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """What x (..., D), rotated by RoPE to `positions` (...), was before, up to the factor that YaRN and LongRoPE have."""
    angles = positions[..., None] * frequencies
    return rotate_by(x, angles.cos(), -angles.sin())


def short_context(adjustments: dict[str, Any] | None) -> int | None:
    """With LongRoPE, the length up to which sequences take the short factors (None: another kind of RoPE)."""
    return adjustments["original_max_seq_len"] if adjustments and "long_factor" in adjustments else None


def attention_factor(adjustments: dict[str, Any]) -> float:
    """YaRN's and LongRoPE's factor on cosines and sines (other scalings: 1)."""
    if adjustments.get("attention_factor") is not None:
        return adjustments["attention_factor"]
    factor = adjustments["factor"]
    if "long_factor" in adjustments:
        return math.sqrt(1 + math.log(factor) / math.log(adjustments["original_max_seq_len"])) if factor > 1 else 1.0
    if "beta_fast" not in adjustments:
        return 1.0
    mscale, mscale_all_dim = adjustments.get("mscale"), adjustments.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_get_mscale(factor, mscale) / yarn_get_mscale(factor, mscale_all_dim)
    return yarn_get_mscale(factor)


def yarn_get_mscale(scale: float = 1, mscale: float = 1) -> float:
    """YaRN's factor on attention for a context `scale` times as long as in training (arXiv:2309.00071, section 3.4)."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _scaled(theta: torch.Tensor, adjustments: dict[str, Any], n_elem: int, base: float, long: bool) -> torch.Tensor:
    """RoPE frequencies (n_elem / 2,) with a model's scaling."""
    if "long_factor" in adjustments:
        factors = adjustments["long_factor" if long else "short_factor"]
        return theta / device_tensor(factors, theta.device, theta.dtype)
    if "beta_fast" in adjustments:
        kept = _yarn_kept(theta, adjustments, n_elem, base)
    elif "low_freq_factor" in adjustments:
        kept = _llama_3_kept(theta, adjustments)
    else:
        return theta / adjustments["factor"]
    return (1 - kept) * theta / adjustments["factor"] + kept * theta


def _llama_3_kept(theta: torch.Tensor, adjustments: dict[str, Any]) -> torch.Tensor:
    """The unscaled fraction of each frequency, by its rotations in the original context (arXiv:2407.21783)."""
    low, high = adjustments["low_freq_factor"], adjustments["high_freq_factor"]
    rotations = adjustments["original_max_seq_len"] * theta / (2 * math.pi)
    return ((rotations - low) / (high - low)).clamp(0, 1)


def _yarn_kept(theta: torch.Tensor, adjustments: dict[str, Any], n_elem: int, base: float) -> torch.Tensor:
    """The unscaled fraction of each frequency, linear in its index (arXiv:2309.00071)."""
    original = adjustments["original_max_seq_len"]
    first, last = (
        n_elem * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
        for rotations in (adjustments["beta_fast"], adjustments["beta_slow"])
    )
    if adjustments.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, n_elem - 1)
    index = torch.arange(len(theta), device=theta.device, dtype=theta.dtype)
    return 1 - ((index - first) / (last - first or 0.001)).clamp(0, 1)
