"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

A matrix product in bfloat16 spends much of its time bringing the weight into the kernel's own order. `pack_linears` does
that once, in place of the plain weight, so memory stays the same. Single layers then put many rows through oneDNN's product and
few through our own (`litgpt.kernels`), which reads the same layout as fast as memory gives it; so do all layers in one call
(`litgpt.runners.fused`), for any number of rows.
"""

import itertools
import weakref

import torch
from torch import nn

from litgpt.fingerprint import sample
from litgpt.kernels import ops
from litgpt.runners.quantized_weights import Int4Linear

ROWS_HINT = 128  # the layout is chosen for this many tokens; it also serves one token well

# Compiled graphs cannot hold opaque tensors: there a packed weight is an integer key, looked up when the graph runs.
_packed_weights: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()
_next_key = itertools.count()

_library = torch.library.Library("litgpt", "DEF")
_library.define("packed_linear(Tensor x, int key, int out_features) -> Tensor")


def _packed_linear(x: torch.Tensor, key: int, out_features: int) -> torch.Tensor:
    return _packed_weights[key].product(x)


_library.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake(
    "litgpt::packed_linear", lambda x, key, out_features: x.new_empty(*x.shape[:-1], out_features), lib=_library
)


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on CPU in bfloat16, or several with the same input as one, their outputs side by side.

    The state dict of a single one is that of the layer it was made from.

    Args:
        linears: the plain layers. Their weights' memory is given back; `plain` fills the same parameters again.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self._plain = linears  # a tuple: no submodules, their weights no parameters of this one
        self.sizes = [linear.out_features for linear in linears]
        self.in_features, self.out_features = linears[0].in_features, sum(self.sizes)
        single = len(linears) == 1
        weight = linears[0].weight if single else torch.cat([linear.weight for linear in linears])
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
        self.address = torch.ops.mkldnn.data_ptr(self.packed) if ops.reads_packed_weights() else None
        if single or linears[0].bias is None:
            self.bias = linears[0].bias
        else:
            self.register_buffer("bias", torch.cat([linear.bias.detach() for linear in linears]), persistent=False)
        self.samples = [sample(linear.weight) for linear in linears]
        for linear in linears:
            linear.weight.data = linear.weight.new_empty(0)
        self.key = next(_next_key)
        _packed_weights[self.key] = self

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight (out_features, in_features), a copy."""
        return self.packed.to_dense()

    def plain(self) -> tuple[nn.Linear, ...]:
        """The layers that this one was made from, as they were."""
        for linear, weight in zip(self._plain, self.weight.split(self.sizes), strict=True):
            linear.weight.data = weight.clone() if len(self.sizes) > 1 else weight
        return self._plain

    def weight_samples(self) -> dict[str, torch.Tensor]:
        """A few values of the plain weight (of one layer), for `litgpt.fingerprint`."""
        return {"weight": self.samples[0]}

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.address is not None and x.numel() <= ops.MAX_ROWS * self.in_features:
            return ops.linear_blocked(x, self.address, self.bias, self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.litgpt.packed_linear(x, self.key, self.out_features)
        return self.product(x)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


class SharedLinear(nn.Module):
    """`nn.Linear` whose plain weight is also that of an embedding, and so is not packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._plain = (linear,)
        self.weight, self.bias = linear.weight, linear.bias
        self.key = next(_next_key)
        _packed_weights[self.key] = self

    def plain(self) -> tuple[nn.Linear, ...]:
        """The layer that this one was made from."""
        return self._plain

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= ops.MAX_ROWS * self.weight.shape[1] and ops.available():
            return ops.linear_plain(x, self.weight, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.litgpt.packed_linear(x, self.key, self.weight.shape[0])
        return self.product(x)


class PackedGatedMLP(nn.Module):
    """A gated MLP (`fc_1`, `fc_2`, `proj`, and `gated` between them) whose first two layers are one product."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self._plain = (mlp,)
        self._first = (PackedLinear(mlp.fc_1, mlp.fc_2),)
        self.proj = PackedLinear(mlp.proj)
        self.activation: int | None = None  # of the kernel that does all at once, where there is one
        if self.proj.address is not None and mlp.fc_1.out_features % ops.UNIT == 0 and mlp.fc_1.bias is None:
            self.activation = ops.ACTIVATIONS.get(mlp.activation)
        self.key = next(_next_key)
        _packed_weights[self.key] = self

    def weight_samples(self) -> dict[str, torch.Tensor]:
        """As that of `PackedLinear`."""
        layers = zip(("fc_1", "fc_2", "proj"), self.first.samples + self.proj.samples, strict=True)
        return {f"{name}.weight": values for name, values in layers}

    @property
    def first(self) -> "PackedLinear":
        """The product with `fc_1` and `fc_2`, one after the other."""
        return self._first[0]

    def plain(self) -> nn.Module:
        """The module that this one was made from, as it was."""
        self.first.plain(), self.proj.plain()
        return self._plain[0]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first
        if self.activation is not None and x.numel() <= ops.MAX_ROWS * first.in_features:
            return ops.gated_mlp_blocked(x, first.address, self.proj.address, self.proj.in_features, self.activation)
        gate, x = first(x).chunk(2, dim=-1)
        return self.proj(self._plain[0].gated(gate, x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.litgpt.packed_linear(x, self.key, self.proj.out_features)
        return self.product(x)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        (mlp,) = self._plain
        for name, linear, weight in zip(
            ("fc_1", "fc_2"), (mlp.fc_1, mlp.fc_2), self.first.weight.chunk(2), strict=True
        ):
            destination[f"{prefix}{name}.weight"] = weight
            if linear.bias is not None:
                destination[f"{prefix}{name}.bias"] = linear.bias if keep_vars else linear.bias.detach()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this machine and build of torch have packed products for such a weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(model: nn.Module) -> None:
    """Replace the plain linear layers of `model` by packed ones, where that works.

    One at a time, so that no more than one weight is held twice. One that an embedding shares stays as it is.
    """
    _pack(model, {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)})


def _pack(module: nn.Module, embeddings: set[int]) -> None:
    for name, child in list(module.named_children()):
        gated = [getattr(child, layer, None) for layer in ("fc_1", "fc_2", "proj")] if hasattr(child, "gated") else []
        if gated and all(_is_plain(layer) for layer in gated):
            setattr(module, name, PackedGatedMLP(child))
        elif _is_plain(child):
            kind = SharedLinear if id(child.weight) in embeddings else PackedLinear
            setattr(module, name, kind(child))
        elif isinstance(child, Int4Linear):
            child.pack()
        else:
            _pack(child, embeddings)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and can_pack(module.weight)


def unpack_linears(model: nn.Module) -> None:
    """Undo `pack_linears`: the same layers with the same parameters, so that optimizers that know them go on working."""
    for name, child in list(model.named_children()):
        if isinstance(child, PackedGatedMLP):
            setattr(model, name, child.plain())
        elif isinstance(child, (PackedLinear, SharedLinear)):
            setattr(model, name, child.plain()[0])
        elif isinstance(child, Int4Linear):
            child.unpack()
        else:
            unpack_linears(child)
