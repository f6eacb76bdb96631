"""Rotary position embedding (arXiv:2104.09864): frequencies, tables of cosines and sines, and the rotation itself."""

import math
from typing import Any

import torch

Rope = tuple[torch.Tensor, torch.Tensor]


def rotate(x: torch.Tensor, rope: Rope | None, interleave: bool = False) -> torch.Tensor:
    """Apply RoPE to the first n elements of x (B, heads, T, D), whose rotated pairs are halves, or with `interleave`
    neighbours: then the result is in halves all the same.

    `rope` holds cosines and sines, (B or 1, 1, T, n) each, the sines with the sign that the element each one multiplies
    takes: the first half of a rotated vector gets minus the second, so that turning is one multiplication, one roll, one
    addcmul. `None` leaves x as it is, for layers without RoPE.
    """
    if rope is None:
        return x
    n = rope[0].shape[-1]
    head = x if n == x.shape[-1] else x[..., :n]
    if interleave:
        head = head.unflatten(-1, (-1, 2)).mT.flatten(-2)
    turned = torch.addcmul(head * rope[0], head.roll(-(n // 2), -1), rope[1])
    return turned if n == x.shape[-1] else torch.cat((turned, x[..., n:]), dim=-1)


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
    """`apply_rope` for x whose rotated pairs are neighbours (0, 1), (2, 3), ... instead of halves.

    The result is in halves, as `apply_rope` gives it: products of queries and keys do not depend on the order.
    """
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
        extra_config: `Config.rope_adjustments`, a scaling. Its keys tell which: {factor} is linear; with low_freq_factor,
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
    scale = 1.0
    if extra_config is not None:
        if long is None:
            long = seq_len > extra_config.get("original_max_seq_len", seq_len)
        theta = _scaled(theta, extra_config, n_elem, base, long)
        scale = attention_factor(extra_config)
    if rope_local_base_freq is not None:
        theta = torch.stack((theta, 1.0 / rope_local_base_freq**exponents), dim=-1)
    positions = torch.arange(seq_len, device=device).float() / condense_ratio
    angles = positions.view(-1, *[1] * theta.ndim) * theta
    angles = torch.cat((angles, angles), dim=1)
    if n_elem > 1:
        angles = angles[:, :n_elem]  # of an odd number, the last one's partner is left out
    return angles.cos() * scale, angles.sin() * scale


def short_context(adjustments: dict[str, Any] | None) -> int | None:
    """With LongRoPE, the length up to which sequences take the short factors (None: another kind of RoPE)."""
    return adjustments["original_max_seq_len"] if adjustments and "long_factor" in adjustments else None


def attention_factor(adjustments: dict[str, Any]) -> float:
    """What YaRN and LongRoPE multiply cosines and sines by (other scalings: 1)."""
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
        return theta / torch.tensor(factors, dtype=theta.dtype, device=theta.device)
    if "beta_fast" in adjustments:
        kept = _yarn_kept(theta, adjustments, n_elem, base)
    elif "low_freq_factor" in adjustments:
        kept = _llama_3_kept(theta, adjustments)
    else:
        return theta / adjustments["factor"]
    return (1 - kept) * theta / adjustments["factor"] + kept * theta


def _llama_3_kept(theta: torch.Tensor, adjustments: dict[str, Any]) -> torch.Tensor:
    """How far each frequency stays as it is, 0 to 1: by the turns it makes in the original context (arXiv:2407.21783)."""
    low, high = adjustments["low_freq_factor"], adjustments["high_freq_factor"]
    turns = adjustments["original_max_seq_len"] * theta / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(theta: torch.Tensor, adjustments: dict[str, Any], n_elem: int, base: float) -> torch.Tensor:
    """As `_llama_3_kept`, linear in the frequency's index instead of its turns (arXiv:2309.00071)."""
    original = adjustments["original_max_seq_len"]
    first, last = (
        n_elem * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (adjustments["beta_fast"], adjustments["beta_slow"])
    )
    if adjustments.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, n_elem - 1)
    index = torch.arange(len(theta), device=theta.device, dtype=theta.dtype)
    return 1 - ((index - first) / (last - first or 0.001)).clamp(0, 1)
