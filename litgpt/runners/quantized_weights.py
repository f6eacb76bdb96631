"""Weights as integers of 8 or 4 bits: less memory, and less to read for every token.

Only weights are quantised, not activations. A quantised layer computes `F.linear` with its `dequantized` weight, up to the
rounding of the data type. Its state dict is the quantised form:

- int8: `weight` (N, K) int8 and `scale` (N,) float32; row n of the weight is `weight[n] * scale[n]`.
- int4: `weight` (N, K / 2) uint8, whose low halves are the even columns and whose high halves are the odd ones, with
  `scale` and `minimum` (N, K / group_size) float16; column k of row n is `bits * scale[n, g] + minimum[n, g]` with
  `g = k // group_size`. GGUF's Q4_0 and Q4_1 blocks have this form and are kept unchanged in groups of 32 (a scale may be
  negative).

Letters: N outputs and K inputs of a layer.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.fingerprint import sample
from litgpt.kernels import ops
from litgpt.kernels.structs import INT4, INT8, Weight, address
from litgpt.model import GPT, LLaMAMoE
from litgpt.runners.opaque_weights import OpaqueLayer

MODES = ("int8", "int4")
BNB_MODES = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", "bnb.int8-training")
GROUP_SIZES = (32, 64, 128)
KERNEL_ROWS = 24  # with more rows of inputs, a product with the dequantised weight is faster than torch's kernels
_CUTS = (1.0, 0.9, 0.8)  # fractions of a group's extremes that are tried as limits in int4
_KERNEL_DTYPES = (torch.bfloat16, torch.float32)
PIECE = 2**18  # number of weights quantised at a time, to bound temporary memory


@dataclass(frozen=True)
class Scheme:
    """How the weights of a model are quantised.

    Args:
        mode: int8, int4, or bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq, bnb.int8; bnb.int8-training is the same as bnb.int8.
        group_size: columns that share a scale in mode int4: 32, 64 or 128.

    Raises:
        ValueError: for other values, and if the mode is not available on this machine.
    """

    mode: str
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES + BNB_MODES:
            raise ValueError(f"quantize={self.mode!r} is not one of {', '.join(MODES + BNB_MODES)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {self.group_size}")
        if self.mode in BNB_MODES and not torch.cuda.is_available():
            raise ValueError(f"quantize={self.mode!r} needs a GPU that torch can use here; int8 and int4 do not")
        if self.mode in BNB_MODES and find_spec("bitsandbytes") is None:
            raise ValueError(f"quantize={self.mode!r} needs the package bitsandbytes: pip install 'litgpt[bnb]'")


def quantize_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers (N, K) and scales (N,) of weights (N, K). The scales are numbers that bfloat16 can hold."""
    values = values.float()
    scale = (values.abs().amax(dim=1) / 127).bfloat16().float()  # at most 2^-9 too small: 127 stays the largest
    return (values / scale.clamp(min=1e-30).unsqueeze(1)).round_().to(torch.int8), scale


def dequantize_int8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dequantised weights (N, K)."""
    if dtype == torch.bfloat16:  # holds both factors exactly
        return weight.to(dtype).mul_(scale.to(dtype).unsqueeze(1))
    return (weight * scale.unsqueeze(1)).to(dtype)


def quantize_int4(values: torch.Tensor, group_size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of integers (N, K / 2), scales and minima (N, K / group_size) of weights (N, K).

    Each group gets the range, out of a few, with the least squared error, which may clip its extremes. Weights that were
    dequantised from 4 bits in groups of that size keep their integers.
    """
    groups = values.float().unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=2)
    fit = _Fit(groups, (high - low) / 15, low)
    if _have_few_values(groups):
        most = torch.where(high > -low, high, low)
        fit.try_out(most / -8, most)  # as in GGUF's Q4_0, where the number of the largest size is -8 times the scale
        for steps in range(14, 0, -1):
            fit.try_out((high - low) / steps, low)
    else:
        for a, b in itertools.product(_CUTS, _CUTS):
            fit.try_out((high * b - low * a) / 15, low * a)
        fit.try_out(*fit.least_squares())
    return _pairs(fit.bits(fit.scale, fit.minimum).to(torch.uint8).flatten(1)), fit.scale, fit.minimum


class _Fit:
    """The best scales and minima so far (N, K / group_size) for groups of weights (N, K / group_size, group_size)."""

    def __init__(self, groups: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> None:
        self.groups, self.scale, self.minimum = groups, scale.half(), minimum.half()
        self.error = self._error(self.scale, self.minimum)
        self.exact = not self.error.any()

    def bits(self, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """The nearest integers, as floats."""
        steps = scale.float().masked_fill(scale == 0, 1e-30).unsqueeze(2)
        return (self.groups - minimum.float().unsqueeze(2)).div_(steps).round_().clamp_(0, 15)

    def _error(self, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        rounded = self.bits(scale, minimum).mul_(scale.float().unsqueeze(2)).add_(minimum.float().unsqueeze(2))
        return rounded.sub_(self.groups).square_().sum(dim=2)

    def try_out(self, scale: torch.Tensor, minimum: torch.Tensor) -> None:
        """Use these for the groups where the error is smaller."""
        if self.exact:
            return
        scale, minimum = scale.half(), minimum.half()
        error = self._error(scale, minimum)
        better = error < self.error
        self.scale, self.minimum = torch.where(better, scale, self.scale), torch.where(better, minimum, self.minimum)
        self.error = torch.where(better, error, self.error)

    def least_squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The least-squares scales and minima for the current integers."""
        bits = self.bits(self.scale, self.minimum)
        bits_mean, mean = bits.mean(dim=2), self.groups.mean(dim=2)
        bits -= bits_mean.unsqueeze(2)
        scale = (bits * self.groups).sum(dim=2) / bits.square_().sum(dim=2).clamp(min=1e-30)
        return scale, mean - scale * bits_mean


def _have_few_values(groups: torch.Tensor) -> bool:
    """Whether a sample of the groups has at most 16 different values each."""
    some = groups.flatten(0, 1)
    some = some[:: max(1, len(some) // 64)].sort(dim=1).values
    return bool((some.diff(dim=1) > 0).sum(dim=1).lt(16).all())


def dequantize_int4(
    weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The dequantised weights (N, K)."""
    groups = _bits(weight, torch.float32).view(*scale.shape, -1)
    return groups.mul_(scale.float().unsqueeze(2)).add_(minimum.float().unsqueeze(2)).flatten(1).to(dtype)


class _DequantizedProduct(torch.autograd.Function):
    """Inputs times a layer's dequantised weight, which is recomputed in the backward pass. Only inputs get gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "QuantizedLinear") -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, None]:
        return d_y @ ctx.layer.dequantized(d_y.dtype), None


class QuantizedLinear(OpaqueLayer):
    """`nn.Linear` with an integer weight that is not trained.

    Attributes:
        dtype: of inputs and results. `to(dtype)` and the like change it and the bias, never the weight's buffers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        group_size: int = 32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias, self.dtype = in_features, out_features, bias, dtype
        self.group_size = group_size
        for name, (shape, form) in self.buffer_shapes().items():
            self.register_buffer(name, torch.zeros(shape, dtype=form, device=device))

    def buffer_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the weight's buffers."""
        raise NotImplementedError

    @torch.no_grad()
    def set_rows(self, row: int, values: torch.Tensor) -> None:
        """Quantise `values` (n, K) as the rows of the weight from `row` on."""
        if values.is_meta:
            return
        for part in self.quantized_parts(
            values.to(self.weight.device)
        ):  # each is gone before the next, or the heap gets holes
            for name, rows in part.items():
                getattr(self, name)[row : row + len(rows)] = rows
            row += len(rows)

    def quantized(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The buffers' values for rows (n, K) of a weight."""
        parts = list(self.quantized_parts(values))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def quantized_parts(self, values: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """`quantized` for some rows after the other."""
        return map(self.quantized_part, values.split(max(1, PIECE // self.in_features)))

    def quantized_part(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`quantized` for few enough rows that float32 copies are small."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K) that the layer computes with."""
        raise NotImplementedError

    def kernel(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A kernel for the product of few rows (n, K) with the quantised weight, if there is one."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        if torch.is_grad_enabled() and x.requires_grad:  # kernels have no gradients
            y = _DequantizedProduct.apply(x, self)
            return y if self.bias is None else y + self.bias
        kernel = None if len(rows) > KERNEL_ROWS else self.kernel(x)
        if kernel is None:
            return F.linear(x, self.dequantized(x.dtype), self.bias)
        y = kernel(rows).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def weight_samples(self) -> dict[str, torch.Tensor]:
        return {name: sample(buffer) for name, buffer in self.named_buffers(recurse=False)}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, nn.Parameter):
                return fn(tensor)
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)  # bytes, so that `fn` converts no dtype

        return super()._apply(move, recurse)


class Int8Linear(QuantizedLinear):
    """`nn.Linear` with an 8-bit weight and a scale for each row."""

    def buffer_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        N, K = self.out_features, self.in_features
        return {"weight": ((N, K), torch.int8), "scale": ((N,), torch.float32)}

    def quantized_part(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(("weight", "scale"), quantize_int8(values), strict=True))

    def kernel_weight(self) -> Weight | None:
        size = {"kind": INT8, "K": self.in_features, "N": self.out_features}
        return Weight(**size, w=address(self.weight), scale=address(self.scale), bias=address(self.bias))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_int8(self.weight, self.scale, dtype)

    def kernel(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if _has_kernels(x):
            return lambda rows: ops.linear_int8(rows, self.weight, self.scale)
        # torch's kernel reads past the end of rows that are no multiple of its vectors
        if x.device.type != "cpu" or x.dtype not in _KERNEL_DTYPES or self.in_features % 32:
            return None
        return lambda rows: torch._weight_int8pack_mm(rows, self.weight, self.scale.to(rows.dtype))


class Int8Embedding(Int8Linear):
    """`nn.Embedding` with an 8-bit table and a scale for each row."""

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        rows = self.weight[idx].to(self.dtype)
        return rows * self.scale[idx].to(self.dtype).unsqueeze(-1)


class TiedHead(OpaqueLayer):
    """An output embedding with the table of the input embedding."""

    def __init__(self, table: Int8Embedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._table = (table,)  # a tuple, so no submodule: it is stored once
        self.in_features, self.out_features, self.bias = table.in_features, table.out_features, bias

    @property
    def weight(self) -> torch.Tensor:
        return self._table[0].weight

    @property
    def scale(self) -> torch.Tensor:
        return self._table[0].scale

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return self._table[0].dequantized(dtype)

    def weight_samples(self) -> dict[str, torch.Tensor]:
        return {}

    def product(self, x: torch.Tensor) -> torch.Tensor:
        y = self._table[0].product(x)
        return y if self.bias is None else y + self.bias


class Int4Linear(QuantizedLinear):
    """`nn.Linear` with a 4-bit weight, and a scale and a minimum for each group of columns of a row.

    `pack` reorders the integers for torch's CPU kernel, `unpack` restores them.

    Attributes:
        packed: the integers in the kernel's order, in place of `weight`.
        factors: the kernel's scales, and its values for the integer 8, (K / group_size, N, 2).
    """

    packed: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    def buffer_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        N, K = self.out_features, self.in_features
        factors = (N, K // self.group_size), torch.float16
        return {"weight": ((N, K // 2), torch.uint8), "scale": factors, "minimum": factors}

    def quantized_part(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(("weight", "scale", "minimum"), quantize_int4(values, self.group_size), strict=True))

    def kernel_weight(self) -> Weight | None:
        if self.packed is not None:
            return None
        size = {"kind": INT4, "K": self.in_features, "N": self.out_features, "group": self.group_size}
        factors = {"scale": address(self.scale), "minimum": address(self.minimum)}
        return Weight(**size, **factors, w=address(self.weight), bias=address(self.bias))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        if self.packed is None:
            return dequantize_int4(self.weight, self.scale, self.minimum, dtype)
        bits = _from_kernel(self.packed, _kernel_block(), torch.float32).unflatten(0, (-1, self.group_size))
        bits.mul_(self.scale.T.float().unsqueeze(1)).add_(self.minimum.T.float().unsqueeze(1))
        return bits.flatten(0, 1).to(dtype).T

    def kernel(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if self.packed is None and _has_kernels(x):
            return lambda rows: ops.linear_int4(rows, self.weight, self.scale, self.minimum)
        if self.packed is None or x.dtype != self.factors.dtype:
            return None
        return lambda rows: torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.factors)

    def pack(self) -> None:
        """Use torch's kernel, if it supports this weight and machine and there is none of our own."""
        if self.packed is not None or self.weight.device.type != "cpu" or self.dtype not in _KERNEL_DTYPES:
            return
        if self.dtype == torch.bfloat16 and ops.available():
            return
        block = _kernel_block()
        if block is None or self.out_features % block:
            return
        rows = block * max(1, PIECE // (block * self.in_features))
        parts = (_bits(part, torch.int32) for part in self.weight.split(rows))
        self.packed = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1) for part in parts])
        scale = self.scale.float()
        factors = torch.stack((scale, self.minimum.float() + 8 * scale), dim=2)
        self.factors = factors.transpose(0, 1).to(self.dtype).contiguous()
        self.samples = sample(self.weight)
        self.weight = None

    def unpacked(self) -> nn.Module:
        self.unpack()
        return self

    def unpack(self) -> None:
        """Undo `pack`."""
        if self.packed is not None:
            self.weight = _pairs(_from_kernel(self.packed, _kernel_block(), torch.uint8).T)
            self.packed = self.factors = None

    def weight_samples(self) -> dict[str, torch.Tensor]:
        weight = sample(self.weight) if self.packed is None else self.samples
        return {"weight": weight, "scale": sample(self.scale), "minimum": sample(self.minimum)}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Int4Linear":
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = _pairs(_from_kernel(self.packed, _kernel_block(), torch.uint8).T)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether `litgpt.kernels` has products for rows like x."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and ops.available()


def _bits(pairs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers (N, K) out of pairs (N, K / 2)."""
    wide = pairs.to(torch.int16)  # little-endian: two bytes for a pair
    return wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F).view(torch.uint8).to(dtype)


def _pairs(bits: torch.Tensor) -> torch.Tensor:
    """Pairs (N, K / 2) of integers (N, K) in uint8."""
    return (bits[:, ::2] | bits[:, 1::2] << 4).contiguous()


def _from_kernel(packed: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Integers (K, N) from torch's CPU kernel order: for each block of outputs and each input, bytes that pair an output of
    the block's first half with one of its second."""
    N, K = len(packed), packed.shape[1] * 2
    halves = packed.view(N // block, K, block // 2).transpose(0, 1)
    bits = torch.empty(K, N // block, 2, block // 2, dtype=dtype)
    bits[:, :, 0], bits[:, :, 1] = halves & 15, halves >> 4
    return bits.view(K, N)


@cache
def _kernel_block() -> int | None:
    """Outputs in a block of torch's int4 kernel on this machine; None if its order is not the one that is known here."""
    bits = torch.arange(64 * 32, dtype=torch.int32).view(64, 32) * 7 // 5 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(bits, 1)
    return next((block for block in (64, 32) if torch.equal(_from_kernel(packed, block, torch.int32).T, bits)), None)


def quantize_model(model: GPT, mode: str, group_size: int = 32) -> None:
    """Replace the linear layers and the input embedding of a model by quantised ones, one at a time.

    Routers of experts are small and sensitive, and keep their weights, as do layers that are no plain linear layers. In mode
    int4, embeddings and layers with inputs that are no multiple of the group size get 8 bits, as in GGUF's Q4_1 files. With
    bitsandbytes, layers move to the GPU, and the input embedding is not quantised.

    Args:
        mode, group_size: as for `Scheme`.

    Raises:
        ValueError: as there, and if the model is quantised already.
    """
    how = Scheme(mode, group_size)
    if model.quantization is not None:
        raise ValueError(f"the model is quantised already: {mode} would round its weights once more")
    wte, heads = model.transformer.wte, [layer for layer in model.lm_head.modules() if type(layer) is nn.Linear]
    if mode in MODES:
        form = (wte.weight.dtype, wte.weight.device)
        model.transformer.wte = Int8Embedding(wte.embedding_dim, wte.num_embeddings, None, *form)
        model.transformer.wte.set_rows(0, wte.weight)
    for parent, name, linear in list(_linears(model)):
        if mode in BNB_MODES:
            layer = _bnb_linear(linear, mode)
        elif linear in heads and linear.weight is wte.weight:
            layer = TiedHead(model.transformer.wte, linear.bias)
        else:
            form = (linear.bias, linear.weight.dtype, linear.weight.device)
            if mode == "int8" or linear in heads or linear.in_features % group_size:
                layer = Int8Linear(linear.in_features, linear.out_features, *form)
            else:
                layer = Int4Linear(linear.in_features, linear.out_features, *form, group_size)
            layer.set_rows(0, linear.weight)
        setattr(parent, name, layer)
    model.quantization = how


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The layers to quantise, as (parent, name, layer)."""
    for name, child in module.named_children():
        if type(child) is not nn.Linear:
            yield from _linears(child)
        elif not (isinstance(module, LLaMAMoE) and name == "gate"):
            yield module, name, child


def _bnb_linear(linear: nn.Linear, mode: str) -> nn.Module:
    """The layer as one of bitsandbytes, on the current GPU, which quantises the weight on arrival."""
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if mode.startswith("bnb.int8"):
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    else:
        kind, dq = mode.removeprefix("bnb.").removesuffix("-dq"), mode.endswith("-dq")
        settings = {"compress_statistics": dq, "quant_type": kind}
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, device="meta", **settings)
        layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, **settings)
    layer.bias = linear.bias
    return layer.to("cuda")


def num_parameters(module: nn.Module, requires_grad: bool | None = None) -> int:
    """Number of elements of a module's parameters (with `requires_grad`: of those that are, or are not, trained), those of
    quantised weights included."""
    chosen = [p for p in module.parameters() if requires_grad in (None, p.requires_grad)]
    layers = () if requires_grad else (layer for layer in module.modules() if isinstance(layer, QuantizedLinear))
    # parameters of bitsandbytes pack several elements into a byte
    sizes = [math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel() for p in chosen]
    return sum(sizes) + sum(layer.in_features * layer.out_features for layer in layers)
