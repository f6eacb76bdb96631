"""Linear layers with weights packed for the CPU's matrix kernels.

A matrix product in bfloat16 spends much of its time on reordering the weight for the kernel. `pack_linears` does that once,
in place of the plain weight, so memory stays the same. Where oneDNN multiplies in bfloat16, the packed order is oneDNN's;
single layers use its product for many rows and ours (`litgpt.kernels`), which reads the same order at memory speed, for
few. Elsewhere our kernels do both, as they do for all layers in one call (`litgpt.runners.fused`).
"""

import torch
from torch import nn

from litgpt.fingerprint import sample
from litgpt.kernels import ops, processor
from litgpt.kernels.structs import BLOCKED, PLAIN, Weight, address
from litgpt.runners.opaque_weights import OpaqueLayer

ROWS_HINT = 128  # number of tokens that oneDNN's layout is optimised for; it is also good for one


class KernelLayout:
    """A weight (N, K) in the order of our kernels."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.N, self.K = weight.shape
        self.packed = ops.blocked(weight)
        self.address: int | None = self.packed.data_ptr()  # None: our kernels do not support the order
        self.range = self.address, self.address + self.packed.nbytes

    def __reduce__(self) -> tuple:
        """Copies and pickles pack the weight again: it has an address, and torch cannot copy it in oneDNN's order."""
        return packed_layout, (self.plain(),)

    def plain(self) -> torch.Tensor:
        """The weight (N, K), a copy."""
        return ops.unblocked(self.packed, self.N, self.K)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., K) times the weight: (..., N)."""
        return ops.linear_blocked(x, self.address, bias, self.N)


class OneDnnLayout(KernelLayout):
    """A weight (N, K) in oneDNN's order on this machine, which our kernels may support."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.N, self.K = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        start = torch.ops.mkldnn.data_ptr(self.packed)
        self.address = start if ops.reads_packed_weights() else None
        self.range = start, start + torch.ops.mkldnn._nbytes(self.packed)

    def plain(self) -> torch.Tensor:
        return self.packed.to_dense()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.address is not None and x.numel() <= ops.MAX_ROWS * self.K:
            return super().product(x, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


def packed_layout(weight: torch.Tensor) -> KernelLayout:
    """A weight (N, K) in the order for this machine."""
    return (OneDnnLayout if processor.torch_multiplies_bfloat16() else KernelLayout)(weight)


class PackedLinear(OpaqueLayer):
    """A packed `nn.Linear`, or several with the same input as one, with concatenated outputs.

    With a single layer, the state dict is that layer's.

    Args:
        linears: the plain layers. The memory of their weights is freed; `plain` fills the same parameters again.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self._plain = linears  # a tuple, so no submodules
        self.sizes = [linear.out_features for linear in linears]
        self.in_features, self.out_features = linears[0].in_features, sum(self.sizes)
        single = len(linears) == 1
        weight = linears[0].weight if single else torch.cat([linear.weight for linear in linears])
        self.layout = packed_layout(weight.detach())
        if single or linears[0].bias is None:
            self.bias = linears[0].bias
        else:
            self.register_buffer("bias", torch.cat([linear.bias.detach() for linear in linears]), persistent=False)
        self.samples = [sample(linear.weight) for linear in linears]
        for linear in linears:
            linear.weight.data = linear.weight.new_empty(0)

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight (out_features, in_features), a copy."""
        return self.layout.plain()

    def plain(self) -> tuple[nn.Linear, ...]:
        """The original layers, with their weights restored."""
        for linear, weight in zip(self._plain, self.weight.split(self.sizes), strict=True):
            linear.weight.data = weight.clone() if len(self.sizes) > 1 else weight
        return self._plain

    def unpacked(self) -> nn.Module:
        return self.plain()[0]

    def weight_samples(self) -> dict[str, torch.Tensor]:
        return {"weight": self.samples[0]}

    def packed_ranges(self) -> list[tuple[int, int]]:
        return [self.layout.range]

    def kernel_weight(self) -> Weight | None:
        at = self.layout.address
        size = {"kind": BLOCKED, "K": self.in_features, "N": self.out_features}
        return None if at is None else Weight(**size, w=at, bias=address(self.bias))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.layout.product(x, self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


class SharedLinear(OpaqueLayer):
    """`nn.Linear` that shares its weight with an embedding, and so is not packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._plain = (linear,)
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def unpacked(self) -> nn.Module:
        return self._plain[0]

    def weight_samples(self) -> dict[str, torch.Tensor]:
        return {"weight": sample(self.weight)}

    def kernel_weight(self) -> Weight | None:
        if not self.weight.is_contiguous():
            return None
        return Weight(
            kind=PLAIN, K=self.in_features, N=self.out_features, w=address(self.weight), bias=address(self.bias)
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if ops.is_faster(x.numel() // self.in_features):
            return ops.linear_plain(x, self.weight, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)


class PackedGatedMLP(OpaqueLayer):
    """A packed gated MLP (`fc_1`, `fc_2`, `proj`, and `gated` between them) with one product for the first two layers."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self._plain = (mlp,)
        self._first = (PackedLinear(mlp.fc_1, mlp.fc_2),)
        self.proj = PackedLinear(mlp.proj)
        self.in_features, self.out_features = self.first.in_features, self.proj.out_features
        self.activation: int | None = None  # of the kernel for the whole MLP, if there is one
        if self.proj.layout.address is not None and mlp.fc_1.out_features % ops.TILE == 0 and mlp.fc_1.bias is None:
            self.activation = ops.ACTIVATIONS.get(mlp.activation)

    def weight_samples(self) -> dict[str, torch.Tensor]:
        layers = zip(("fc_1", "fc_2", "proj"), self.first.samples + self.proj.samples, strict=True)
        return {f"{name}.weight": values for name, values in layers}

    def packed_ranges(self) -> list[tuple[int, int]]:
        return self.first.packed_ranges()

    @property
    def first(self) -> "PackedLinear":
        """The layers `fc_1` and `fc_2` as one."""
        return self._first[0]

    def kernel_weights(self) -> dict[str, Weight] | None:
        """Weights of gate, up and down for the kernel of the whole MLP, if there is one."""
        if self.activation is None:
            return None
        half = self.proj.in_features
        gate, up, down = self.first.kernel_weight(), self.first.kernel_weight(), self.proj.kernel_weight()
        gate.N = up.N = half
        up.w += half * ops.packed_inputs(self.in_features) * 2
        return {"gate": gate, "up": up, "down": down}

    def unpacked(self) -> nn.Module:
        self.first.plain(), self.proj.plain()
        return self._plain[0]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.first, self.proj
        if self.activation is not None and x.numel() <= ops.MAX_ROWS * first.in_features:
            addresses = (first.layout.address, second.layout.address)
            return ops.gated_mlp_blocked(x, *addresses, second.in_features, self.activation)
        gate, x = first(x).chunk(2, dim=-1)
        return second(self._plain[0].gated(gate, x))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        (mlp,) = self._plain
        for name, linear, weight in zip(
            ("fc_1", "fc_2"), (mlp.fc_1, mlp.fc_2), self.first.weight.chunk(2), strict=True
        ):
            destination[f"{prefix}{name}.weight"] = weight
            if linear.bias is not None:
                destination[f"{prefix}{name}.bias"] = linear.bias if keep_vars else linear.bias.detach()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN or our kernels have a packed product for the weight on this machine."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and (processor.torch_multiplies_bfloat16() or ops.available())
    )


def pack_linears(model: nn.Module, join: bool = True) -> None:
    """Pack the linear layers of `model` that support it, one at a time, so that only one weight is in memory twice.

    A layer that shares its weight with an embedding keeps it.

    Args:
        join: whether layers with the same input may become one.
    """
    _pack(model, {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}, join)


def _pack(module: nn.Module, embeddings: set[int], join: bool) -> None:
    for name, child in list(module.named_children()):
        gated = [getattr(child, layer, None) for layer in ("fc_1", "fc_2", "proj")] if hasattr(child, "gated") else []
        if join and gated and all(_is_plain(layer) for layer in gated):
            setattr(module, name, PackedGatedMLP(child))
        elif _is_plain(child):
            kind = SharedLinear if id(child.weight) in embeddings else PackedLinear
            setattr(module, name, kind(child))
        elif isinstance(child, OpaqueLayer):
            child.pack()
        else:
            _pack(child, embeddings, join)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and can_pack(module.weight)


def unpack_linears(model: nn.Module) -> None:
    """Undo `pack_linears`: the same layers with the same parameters, which optimizers may hold."""
    for name, child in list(model.named_children()):
        if isinstance(child, OpaqueLayer):
            setattr(model, name, child.unpacked())
        else:
            unpack_linears(child)
