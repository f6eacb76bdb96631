"""LLaMA-Adapter (arXiv:2303.16199): in the upper layers, queries also attend to a learned prefix, weighted by a gate.

Letters as in `model.py`, and P: tokens of the learned prefix.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from litgpt.config import Config as BaseConfig
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache.plan import Plan
from litgpt.model import GPT as BaseModel
from litgpt.model import Block as Block
from litgpt.model import CausalSelfAttention as BaseCausalSelfAttention


@dataclass
class Config(BaseConfig):
    """An architecture, with the length of the learned prefix and the first layer that has one."""

    adapter_prompt_length: int = 10
    adapter_start_layer: int = 2

    def _validate(self) -> None:
        super()._validate()
        self._require("adapter_prompt_length", self.adapter_prompt_length > 0, "positive")
        self._require("adapter_start_layer", self.adapter_start_layer >= 0, "at least 0")
        self._require("latent_attention", self.latent_attention is None, "none: adapters need ordinary attention")


class CausalSelfAttention(BaseCausalSelfAttention):
    """Attention that adds gate * softmax(q K_p) V_p, where K_p and V_p are made of a learned prefix (P, E).

    The prefix has no positions, and its keys no norm. The gate is a number for each head, initially 0.

    Args:
        config: of the model.
        block_idx: the layer.
        base: the layer's attention, whose modules this one takes over (None: new ones).
        dtype: of the added parameters.
    """

    def __init__(
        self,
        config: Config,
        block_idx: int,
        base: BaseCausalSelfAttention | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if base is None:
            super().__init__(config, block_idx)
        else:
            nn.Module.__init__(self)
            self.__dict__.update(base.__dict__)
        form = {"dtype": dtype, "device": self.qkv.weight.device}
        self.adapter_wte = nn.Embedding(config.adapter_prompt_length, config.n_embd, **form)
        self.gating_factor = nn.Parameter(torch.empty(1, 1, config.n_head, 1, **form))
        self.reset_parameters()
        self.register_buffer("frozen_keys", None, persistent=False)
        self.register_buffer("frozen_values", None, persistent=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gating_factor)

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (1, G, P, D) of the learned prefix.

        As in LitGPT 0.5.13, with which prefixes were trained, the output of `qkv` is split as if queries, keys and values
        alternated by head group, although they do not.
        """
        if self.frozen_keys is not None:
            return self.frozen_keys, self.frozen_values
        G, D = self.config.n_query_groups, self.config.head_size
        groups = self.qkv(self.adapter_wte.weight).view(1, -1, G, self.config.n_head // G + 2, D)
        return groups[..., -2, :].transpose(1, 2), groups[..., -1, :].transpose(1, 2)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan | None, token_idx: torch.Tensor | None
    ) -> torch.Tensor:
        y = super().attend(q, k, v, plan, token_idx)
        B, H, T, D = q.shape
        rows = q.transpose(0, 1).reshape(1, H, B * T, D)  # one row, since all queries see the same keys
        learned, _ = self.mha.attend(rows, DefaultKeysAndValues(*self.prefix()), None, False)
        learned = learned.view(H, B, T, D).permute(1, 2, 0, 3)
        return y + (self.gating_factor * learned).flatten(2)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        """Accepts gates (1, H, 1, 1) of older LitGPT checkpoints."""
        if (gate := state_dict.get(f"{prefix}gating_factor")) is not None and gate.numel() == self.config.n_head:
            state_dict[f"{prefix}gating_factor"] = gate.reshape(self.gating_factor.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class GPT(BaseModel):
    """A GPT with learned prefixes."""

    config_class = Config

    def __init__(self, config: Config, **mha_kwargs: Any) -> None:
        super().__init__(config, **mha_kwargs)
        add_prefixes(self, config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CausalSelfAttention):
            module.reset_parameters()


def add_prefixes(model: BaseModel, config: Config) -> None:
    """Add learned prefixes to the layers of `model` from `adapter_start_layer` on, in place."""
    for block_idx, block in enumerate(model.transformer.h):
        if block_idx >= config.adapter_start_layer:
            block.attn = CausalSelfAttention(config, block_idx, block.attn, model.dtype)


@torch.no_grad()
def freeze_prefixes(model: BaseModel) -> None:
    """Fix keys and values of all prefixes for inference; later changes of weights have no effect on them."""
    for block in model.transformer.h:
        if isinstance(block.attn, CausalSelfAttention):
            block.attn.frozen_keys, block.attn.frozen_values = block.attn.prefix()


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    """Freeze all parameters but the prefixes and their gates."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = adapter_filter(name, parameter)


def adapter_filter(key: str, value: Any) -> bool:
    """Whether a parameter belongs to a prefix, and so is trained and saved."""
    return "adapter_wte" in key or "gating_factor" in key
