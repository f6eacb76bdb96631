"""Low-rank adaptation (LoRA, arXiv:2106.09685): a trained product s B A of rank r is added to a frozen weight W.

The scale s is alpha / r, or with rsLoRA (arXiv:2312.03732) alpha / sqrt(r). DoRA (arXiv:2402.09353) trains the norms of the
rows as well: row i of the weight becomes m_i (W + s B A)_i / ||(W + s B A)_i||, where the norm counts as a constant.

Letters: E inputs and O outputs of a linear layer, r the rank. A is (r, E), B is (O, r), the magnitudes m are (O,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from litgpt import model as base
from litgpt.config import Config as BaseConfig
from litgpt.model import GPT as BaseModel
from litgpt.model import Block as Block
from litgpt.model import CausalSelfAttention as BaseCausalSelfAttention
from litgpt.runners.opaque_weights import LowRankLayer, OpaqueLayer
from litgpt.settings import fits

# Makes the replacement of a layer from its role (qkv, projection, mlp or head), inputs, outputs and itself
Wrap = Callable[[str, int, int, nn.Module], nn.Module]


@dataclass
class Config(BaseConfig):
    """An architecture, with the layers that get LoRA matrices and their rank.

    `lora_mlp` means all linear layers of the MLP, of every expert too, and the experts' router. `lora_all` means all linear
    layers but the head, and sets the other flags. `lora_rslora` and `lora_dora` choose the kind of LoRA.
    """

    lora_r: int = 0
    lora_alpha: int = 1
    lora_dropout: float = 0.0
    lora_query: bool = False
    lora_key: bool = False
    lora_value: bool = False
    lora_projection: bool = False
    lora_mlp: bool = False
    lora_head: bool = False
    lora_all: bool = False
    lora_rslora: bool = False
    lora_dora: bool = False

    def _derive(self) -> None:
        super()._derive()
        if self.lora_all:
            parts = ("projection", "mlp") if self.latent_attention else ("query", "key", "value", "projection", "mlp")
            for part in parts:
                setattr(self, f"lora_{part}", True)

    def lora_options(self) -> dict[str, Any]:
        """The fields that the weights depend on, for `hyperparameters.yaml`: LitGPT's, and others only if set, so that LitGPT
        can read the file."""
        ours = ("lora_rslora", "lora_dora")
        names = [f.name for f in fields(self) if f.name.startswith("lora_") and f.name not in ("lora_all", *ours)]
        return {name: getattr(self, name) for name in names} | {name: True for name in ours if getattr(self, name)}

    def _validate(self) -> None:
        super()._validate()
        self._require("lora_r", isinstance(self.lora_r, int) and self.lora_r >= 0, "a whole number, at least 0")
        self._require("lora_alpha", fits(self.lora_alpha, float), "a finite number")
        proper = isinstance(self.lora_dropout, int | float) and 0 <= self.lora_dropout < 1
        self._require("lora_dropout", proper, "a number, at least 0 and below 1")


class WrappedLinear(nn.Module):
    """A linear layer, named `linear`, with parameters added by fine-tuning. Also loads the plain layer's state dict."""

    def _wrap(
        self,
        in_features: int,
        out_features: int,
        linear: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Wrap a layer, which may be quantised (None: a new one, from `kwargs`); added parameters have `dtype` (None: as the
        layer's weight)."""
        self.linear = nn.Linear(in_features, out_features, dtype=dtype, **kwargs) if linear is None else linear
        self._form = {"dtype": dtype or self.linear.weight.dtype, "device": self.linear.weight.device}

    def _new_parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **self._form))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        for kind in ("weight", "bias"):
            if f"{prefix}{kind}" in state_dict:
                state_dict[f"{prefix}linear.{kind}"] = state_dict.pop(f"{prefix}{kind}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoRALayer(nn.Module):
    """Base class of layers with LoRA matrices.

    Args:
        r: the rank; 0: no matrices.
        lora_alpha: numerator of the scale.
        lora_dropout: dropout probability of the inputs of A.
        rslora: scale by lora_alpha / sqrt(r) instead of lora_alpha / r.
        dora: also train the magnitudes of the weight's rows.
    """

    def __init__(self, r: int, lora_alpha: int, lora_dropout: float, rslora: bool = False, dora: bool = False) -> None:
        super().__init__()
        if r < 0:
            raise ValueError(f"the rank r must be at least 0, got {r}")
        self.r, self.lora_alpha, self.rslora, self.dora = r, lora_alpha, rslora, dora
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.merged = False


class LoRALinear(LoRALayer, WrappedLinear, LowRankLayer):
    """A linear layer with LoRA matrices: W x + s B A dropout(x), with DoRA scaled row by row.

    Args:
        in_features: E.
        out_features: O.
        r, lora_alpha, lora_dropout, rslora, dora: as for `LoRALayer`.
        linear, kwargs: as for `WrappedLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        *,
        rslora: bool = False,
        dora: bool = False,
        linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(r, lora_alpha, lora_dropout, rslora, dora)
        self._wrap(in_features, out_features, linear, **kwargs)
        self._add_matrices(r, in_features, out_features)

    def _add_matrices(self, rows: int, in_features: int, out_features: int) -> None:
        if self.r > 0:
            self.scaling = self.lora_alpha / (math.sqrt(self.r) if self.rslora else self.r)
            self.lora_A = self._new_parameter(rows, in_features)
            self.lora_B = self._new_parameter(out_features, self.r)
            if self.dora:
                self.lora_magnitude = self._new_parameter(out_features)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random A and zero B: at first the layer equals the plain one."""
        if self.r > 0:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
            self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        """Set the magnitudes to the norms of the weight's rows, and clear cached norms."""
        self._squares: torch.Tensor | None = None
        self.fixed_scale: torch.Tensor | None = None
        if self.r > 0 and self.dora:
            self.lora_magnitude.copy_(self._row_squares().sqrt()[self.lora_rows])

    @property
    def lora_rows(self) -> torch.Tensor | slice:
        """Rows of the weight that have matrices."""
        return slice(None)

    def _row_squares(self) -> torch.Tensor:
        """Squared norms (O,) of the rows of the frozen W, computed once."""
        if self._squares is None:
            weight = plain_weight(self.linear, self._form["dtype"])
            form = torch.promote_types(weight.dtype, torch.float32)
            self._squares = torch.cat([part.to(form).square().sum(dim=1) for part in weight.split(1024)])
        return self._squares

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        """Norms (O,) of the rows of W + s B A, without computing that matrix."""
        A, B, s = self.lora_A, self.expanded_B(), self.scaling
        with torch.autocast(A.device.type, enabled=False):
            crossed = self.linear(A).T  # W A' (O, r)
            if self.linear.bias is not None:
                crossed = crossed - self.linear.bias[:, None]
            squares = self._row_squares()
            A, B, crossed = A.to(squares.dtype), B.to(squares.dtype), crossed.to(squares.dtype)
            return (squares + (B * (2 * s * crossed + s * s * (B @ (A @ A.T)))).sum(dim=1)).clamp(min=0).sqrt()

    def row_scale(self, norms: torch.Tensor) -> torch.Tensor:
        """DoRA's factors (O,) on the rows of W + s B A, given the norms of these rows."""
        rows = self.lora_rows
        scale = self.lora_magnitude / norms[rows].clamp(min=torch.finfo(norms.dtype).tiny).to(self.lora_magnitude.dtype)
        return scale if isinstance(rows, slice) else scale.new_ones(len(norms)).index_copy(0, rows, scale)

    @torch.no_grad()
    def fix_scale(self) -> None:
        """Fix DoRA's factors for inference; later changes of weights have no effect on them."""
        if self.r > 0 and self.dora and not self.merged:
            self.fixed_scale = self.row_scale(self._norms())

    def _apply(self, *args: Any, **kwargs: Any) -> "LoRALinear":
        self._squares = None  # precision or device may change
        if getattr(self, "fixed_scale", None) is not None:
            self.fixed_scale = args[0](self.fixed_scale)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        known = f"{prefix}lora_magnitude" in state_dict
        reads_weight = any(f"{prefix}{name}" in state_dict for name in ("weight", "linear.weight"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if reads_weight and not known and self.r > 0 and self.dora:
            weight = state_dict[f"{prefix}linear.weight"]
            self.lora_magnitude.data.copy_(weight.float().norm(dim=1)[self.lora_rows])
        self._squares = self.fixed_scale = None

    def expanded_B(self, B: torch.Tensor | None = None) -> torch.Tensor:
        """B (default: `lora_B`) expanded so that `expanded_B() @ lora_A` has the weight's shape."""
        return self.lora_B if B is None else B

    @torch.no_grad()
    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.dora or self.merged:
            return None
        if self.r == 0:
            self._small = (self.linear.weight.new_empty(0, 0), None)
        else:
            scaled = self.expanded_B().to(torch.float32) * self.scaling
            self._small = (self.lora_A.detach().contiguous(), scaled.T.contiguous())
        return self._small

    def get_lora_AB(self) -> torch.Tensor:
        """The product of the matrices that is added to the weight, (O, E)."""
        return self.expanded_B() @ self.lora_A * self.scaling

    @torch.no_grad()
    def merged_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight W (O, E) merged with the matrices, in float32 at least."""
        form = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(form) + self.get_lora_AB().to(form)
        return weight * self.row_scale(weight.norm(dim=1)).to(form).unsqueeze(1) if self.dora else weight

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the matrices into the weight, with sums in float32; they have no effect afterwards."""
        if self.r == 0 or self.merged:
            return
        if not isinstance(self.linear, nn.Linear):
            raise ValueError(
                f"LoRA matrices cannot be merged into a {type(self.linear).__name__}: the layer must be a plain one"
            )
        self.linear.weight.copy_(self.merged_weight(self.linear.weight))
        self.merged = True

    def with_matrices(self, x: torch.Tensor, dropped: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """W x + s B A `dropped`."""
        return torch.add(self.linear(x), F.linear(F.linear(dropped, A), B), alpha=self.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.r == 0 or self.merged:
            return self.linear(x)
        y = self.with_matrices(x, self.lora_dropout(x), self.lora_A, self.expanded_B())
        if not self.dora:
            return y
        scale = self.row_scale(self._norms()) if self.fixed_scale is None else self.fixed_scale
        return y * scale if self.linear.bias is None else y * scale + (1 - scale) * self.linear.bias


class LoRAQKVLinear(LoRALinear):
    """The projection to queries, keys and values, with separate matrices for each enabled part.

    A is (n * r, E) for n enabled parts; B is (rows of the enabled parts, r).

    Args:
        in_features: E.
        out_features: O = (n_head + 2 * n_query_groups) * head_size.
        head_size, n_head, n_query_groups: sizes of the attention.
        r, lora_alpha, lora_dropout, rslora, dora, linear, kwargs: as for `LoRALinear`.
        enable_lora: for queries, keys and values, or one for all.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        head_size: int,
        n_head: int,
        n_query_groups: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        enable_lora: bool | tuple[bool, bool, bool] = False,
        *,
        rslora: bool = False,
        dora: bool = False,
        linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, rslora, dora)
        self._wrap(in_features, out_features, linear, **kwargs)
        self.head_size, self.n_head, self.n_query_groups = head_size, n_head, n_query_groups
        self.enable_lora = (enable_lora,) * 3 if isinstance(enable_lora, bool) else tuple(enable_lora)
        if len(self.enable_lora) != 3:
            raise ValueError(f"enable_lora must have an entry for queries, keys and values, got {enable_lora}")
        self.part_sizes = [heads * head_size for heads in (n_head, n_query_groups, n_query_groups)]
        self.r = r if any(self.enable_lora) else 0
        self._add_matrices(sum(self.enable_lora) * r, in_features, sum(self.qkv_shapes))

    @property
    def qkv_shapes(self) -> list[int]:
        """Number of rows of each enabled part."""
        return [size for size, enabled in zip(self.part_sizes, self.enable_lora, strict=True) if enabled]

    @property
    def lora_ind(self) -> torch.Tensor:
        """Indices of the weight's rows that have matrices."""
        device = self.lora_B.device if self.r > 0 else self.linear.weight.device
        parts = torch.arange(sum(self.part_sizes), device=device).split(self.part_sizes)
        return torch.cat([part for part, enabled in zip(parts, self.enable_lora, strict=True) if enabled])

    @property
    def lora_rows(self) -> torch.Tensor | slice:
        return slice(None) if all(self.enable_lora) else self.lora_ind

    def expanded_B(self, B: torch.Tensor | None = None) -> torch.Tensor:
        """B as (O, n * r), block-diagonal: each part in its own rows and the columns of its own A."""
        flags = list(zip(self.part_sizes, self.enable_lora, strict=True))
        B = self.lora_B if B is None else B
        parts = iter(B.split(self.qkv_shapes))
        return torch.block_diag(*(next(parts) if on else B.new_empty(size, 0) for size, on in flags))

    def zero_pad(self, x: torch.Tensor) -> torch.Tensor:
        """Values (..., enabled rows) extended by zeros for the other rows to (..., O)."""
        return x.new_zeros(*x.shape[:-1], sum(self.part_sizes)).index_copy_(-1, self.lora_ind, x)

    def conv1d(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product of every part's own r channels of the input (B, n * r, T) and its rows of a weight shaped as B,
        (enabled rows, r, 1): (B, enabled rows, T)."""
        parts = zip(input.chunk(sum(self.enable_lora), dim=1), weight.split(self.qkv_shapes), strict=True)
        return torch.cat([F.conv1d(channels, rows) for channels, rows in parts], dim=1)


class CausalSelfAttention(BaseCausalSelfAttention):
    """Attention whose linear layers have LoRA matrices."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        wrap_attention(self, _wrapper(config))


class GptNeoxMLP(base.GptNeoxMLP):
    """That MLP with LoRA matrices, if `lora_mlp` asks for them, as the next ones."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        wrap_mlp(self, _wrapper(config))


class LLaMAMLP(base.LLaMAMLP):
    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        wrap_mlp(self, _wrapper(config))


class GemmaMLP(base.GemmaMLP, LLaMAMLP):
    pass


class LLaMAMoE(base.LLaMAMoE):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        wrap_mlp(self, _wrapper(config))


class GPT(BaseModel):
    """A GPT with LoRA matrices."""

    config_class = Config

    def __init__(self, config: Config, **mha_kwargs: Any) -> None:
        super().__init__(config, **mha_kwargs)
        add_lora(self, config)
        for block in self.transformer.h:
            if type(block.attn) is BaseCausalSelfAttention:
                block.attn.__class__ = CausalSelfAttention

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LoRALinear):
            module.reset_parameters()


def add_lora(model: BaseModel, config: Config) -> None:
    """Wrap the linear layers of `model` in place, for the parameter names of LoRA checkpoints even those without matrices;
    `unwrap_lora` undoes it."""
    wrap_linears(model, _wrapper(config, model.dtype))
    model.train(model.training)  # also the new dropout layers


def _wrapper(config: Config, dtype: torch.dtype | None = None) -> Wrap:
    """Adds matrices to a layer, for `wrap_linears`."""
    heads = (config.head_size, config.n_head, config.n_query_groups)
    enabled = (config.lora_query, config.lora_key, config.lora_value)
    settings = {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout, "dtype": dtype}
    settings |= {"rslora": config.lora_rslora, "dora": config.lora_dora}

    def wrap(role: str, in_features: int, out_features: int, layer: nn.Module) -> LoRALinear:
        sizes = (in_features, out_features)
        if role == "qkv":
            return LoRAQKVLinear(*sizes, *heads, config.lora_r, enable_lora=enabled, linear=layer, **settings)
        return LoRALinear(*sizes, config.lora_r if getattr(config, f"lora_{role}") else 0, linear=layer, **settings)

    return wrap


def create_lora_linear(
    config: Config, in_size: int, out_size: int, bias: bool | None = None, use_r: bool | None = None
) -> LoRALinear:
    """A new linear layer, with matrices if `use_r` (None: if the layers of MLPs have them)."""
    r = config.lora_r if (config.lora_mlp if use_r is None else use_r) else 0
    bias = config.bias if bias is None else bias
    kind = {"rslora": config.lora_rslora, "dora": config.lora_dora}
    return LoRALinear(in_size, out_size, r, config.lora_alpha, config.lora_dropout, bias=bias, **kind)


def wrap_linears(model: BaseModel, wrap: Wrap) -> None:
    """Replace the linear layers of `model`, also quantised ones, by `wrap(role, in_features, out_features, layer)`, where role
    is qkv, projection, mlp or head. The layers that latent attention has instead of `qkv` are not wrapped."""
    E, V = model.config.n_embd, model.config.padded_vocab_size
    model.lm_head = wrap("head", E, V, model.lm_head)
    for block in model.transformer.h:
        wrap_attention(block.attn, wrap)
        wrap_mlp(block.mlp, wrap)


def wrap_attention(attention: nn.Module, wrap: Wrap) -> None:
    """`wrap_linears` for the layers of an attention."""
    attention.proj = wrap("projection", attention.proj.in_features, attention.proj.out_features, attention.proj)
    if isinstance(attention, BaseCausalSelfAttention):
        attention.qkv = wrap("qkv", attention.qkv.in_features, attention.qkv.out_features, attention.qkv)


def wrap_mlp(mlp: nn.Module, wrap: Wrap) -> None:
    """`wrap_linears` for the layers of an MLP, those of its experts too."""
    for parent in list(mlp.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, OpaqueLayer)):
                setattr(parent, name, wrap("mlp", child.in_features, child.out_features, child))


def unwrap_lora(model: BaseModel) -> None:
    """Restore the plain layers where matrices are merged or absent."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear) and (child.merged or child.r == 0):
                setattr(parent, name, child.linear)


def finish_lora(model: BaseModel) -> None:
    """Make a LoRA model faster, for inference."""
    unwrap_lora(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.fix_scale()


def plain_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight (O, E) of a linear layer, dequantised if necessary."""
    if hasattr(layer, "dequantized"):
        return layer.dequantized(dtype)
    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, state).to(dtype)
    if (scale := getattr(layer.weight, "SCB", None)) is not None:  # bitsandbytes' int8
        return (layer.weight.data * (scale / 127).unsqueeze(1)).to(dtype)
    return layer.weight


def merge_lora_weights(model: BaseModel) -> None:
    """Merge all LoRA matrices. A head with matrices that shares the embedding's weight gets its own."""
    head = model.lm_head
    if isinstance(head, LoRALinear) and head.r > 0 and head.linear.weight is model.transformer.wte.weight:
        weight = head.linear.weight
        head.linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge()


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Leave only LoRA matrices to be trained, and biases: "none", "all", or "lora_only", of layers with matrices."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias={bias!r} is not one of none, all, lora_only")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = lora_filter(name, parameter) or bias == "all" and name.endswith("bias")
    if bias == "lora_only":
        for module in model.modules():
            if isinstance(module, LoRALinear) and module.r > 0 and module.linear.bias is not None:
                module.linear.bias.requires_grad = True


def lora_filter(key: str, value: Any) -> bool:
    """Whether a parameter belongs to LoRA, and so is saved."""
    return "lora_" in key
