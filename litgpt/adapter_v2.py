"""LLaMA-Adapter V2 (arXiv:2304.15010): the prefixes of `adapter.py`, trained biases and scales for the outputs of all linear
layers, and trained norms."""

import re
from typing import Any

import torch
from torch import nn

from litgpt import model as base
from litgpt.adapter import GPT as AdapterGPT
from litgpt.adapter import CausalSelfAttention as AdapterAttention
from litgpt.adapter import Config, add_prefixes
from litgpt.lora import Wrap, WrappedLinear, wrap_attention, wrap_linears, wrap_mlp
from litgpt.model import GPT as BaseModel
from litgpt.model import Block as Block


class AdapterV2Linear(WrappedLinear):
    """A linear layer whose outputs (..., O) become scale * (output + bias).

    Args:
        in_features: inputs.
        out_features: O.
        linear, kwargs: as for `WrappedLinear`.
    """

    def __init__(self, in_features: int, out_features: int, *, linear: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__()
        self._wrap(in_features, out_features, linear, **kwargs)
        self.adapter_bias = self._new_parameter(out_features)
        self.adapter_scale = self._new_parameter(out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1 and bias 0: at first the layer equals the plain one."""
        nn.init.ones_(self.adapter_scale)
        nn.init.zeros_(self.adapter_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) + self.adapter_bias) * self.adapter_scale


class CausalSelfAttention(AdapterAttention):
    """Attention with a learned prefix, and scaled and shifted linear layers."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        wrap_attention(self, _wrapper())


class GptNeoxMLP(base.GptNeoxMLP):
    """That MLP with scaled and shifted linear layers, as the next ones."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        wrap_mlp(self, _wrapper())


class LLaMAMLP(base.LLaMAMLP):
    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        wrap_mlp(self, _wrapper())


class GemmaMLP(base.GemmaMLP, LLaMAMLP):
    pass


class LLaMAMoE(base.LLaMAMoE):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        wrap_mlp(self, _wrapper())


class GPT(AdapterGPT):
    """A GPT with learned prefixes, and scaled and shifted linear layers."""

    def __init__(self, config: Config, **mha_kwargs: Any) -> None:
        super().__init__(config, **mha_kwargs)
        scale_linears(self)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AdapterV2Linear):
            module.reset_parameters()


def add_adapter_v2(model: BaseModel, config: Config) -> None:
    """Add prefixes, and biases and scales of all linear layers, to `model` in place."""
    add_prefixes(model, config)
    scale_linears(model)


def scale_linears(model: BaseModel) -> None:
    """Add a bias and a scale to the outputs of every linear layer of `model`, in place."""
    wrap_linears(model, _wrapper(model.dtype))
    for block in model.transformer.h:
        if type(block.attn) is AdapterAttention:
            block.attn.__class__ = CausalSelfAttention


def _wrapper(dtype: torch.dtype | None = None) -> Wrap:
    """Adds a bias and a scale to a layer, for `wrap_linears`."""

    def wrap(role: str, in_features: int, out_features: int, layer: nn.Module) -> AdapterV2Linear:
        return AdapterV2Linear(in_features, out_features, linear=layer, dtype=dtype)

    return wrap


def mark_only_adapter_v2_as_trainable(model: nn.Module) -> None:
    """Freeze all parameters but those of adapters and norms."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = adapter_filter(name, parameter)


_TRAINED = re.compile(r"adapter_wte|gating_factor|adapter_(bias|scale)$|(norm_[12]|ln_f)\.(weight|bias)$")


def adapter_filter(key: str, value: Any) -> bool:
    """Whether a parameter is trained and saved."""
    return _TRAINED.search(key) is not None
