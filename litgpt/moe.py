"""Mixture of experts: routers, and the computation of experts.

Letters: N tokens, E embedding size, X experts, K experts a token, I intermediate size of an expert. Experts are gated MLPs
with the linear layers `fc_1`, `fc_2`, `proj`, and `gated` between them.
"""

import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.config import Config


class GroupedTopkRouter(nn.Module):
    """DeepSeek-V3's router (arXiv:2412.19437, section 2.1.2): the best experts of the best groups of experts.

    Experts are ranked by sigmoid scores plus a correction, which balances their load in training and does not affect the
    weights. Groups are ranked by the sum of their `n_topk_scores_per_group` best scores.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert))
        self.config = config
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    @torch.no_grad()
    def get_topk_indices(self, scores: torch.Tensor) -> torch.Tensor:
        """The experts (N, K) of tokens with scores (N, X)."""
        config = self.config
        scores = scores + self.e_score_correction_bias
        if config.n_expert_groups > 1:
            groups = scores.unflatten(-1, (config.n_expert_groups, -1))
            group_scores = groups.topk(config.n_topk_scores_per_group).values.sum(-1)
            best = group_scores.topk(config.n_topk_groups).indices
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, False)
            scores = groups.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores.topk(config.n_expert_per_token).indices

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (N, K) in float32 and experts (N, K) of tokens (N, E)."""
        with torch.autocast(x.device.type, enabled=False):  # scores are often close to each other
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = self.get_topk_indices(scores)
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights, chosen


class Experts(nn.ModuleList):
    """The experts of one layer, computed by grouped products in inference where torch has them, otherwise in a loop."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self._start_anew()

    def _start_anew(self) -> None:
        self._stacks: ExpertStacks | None = None
        # Compiled graphs cannot choose modules by numbers: there the loop is one opaque operation that looks up this key
        self.key = next(_next_key)
        _experts_by_key[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_anew()  # of a copy: another key, and no stacks

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """For tokens x (N, E), sums (N, E) over k of weights[n, k] * experts[chosen[n, k]](x[n]), from weights (N, K)."""
        if torch.is_grad_enabled():
            return mix_experts(x, weights, chosen, self)
        if torch.compiler.is_compiling():  # weights were stacked in the prefill, which is not compiled
            if self._stacks is None:
                return torch.ops.litgpt.mix_experts(x, weights, chosen, self.key)
            return mix_experts_grouped(x, weights, chosen, self, self._stacks)
        if can_group(x):
            if self._stacks is None or self._stacks.up.data_ptr() != self[0].fc_1.weight.data_ptr():
                self._stacks = stack_experts(self)  # for the first time, or since weights were replaced
            if self._stacks is not None:
                return mix_experts_grouped(x, weights, chosen, self, self._stacks)
        return mix_experts(x, weights, chosen, self)


class ExpertStacks(NamedTuple):
    """The weights of all experts as one tensor each, for grouped products; biases may be None."""

    up: torch.Tensor  # fc_1 over fc_2, (X, 2 I, E)
    down: torch.Tensor  # (X, E, I)
    up_bias: torch.Tensor | None  # (X, 2 I)
    down_bias: torch.Tensor | None  # (X, E)


def mix_experts(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Sequence[nn.Module]
) -> torch.Tensor:
    """The outputs of `Experts`, expert by expert.

    Every expert with tokens runs once, on all of them; the host has to know the number of tokens of each.
    """
    counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    order = chosen.flatten().argsort(stable=True)
    inputs = x[order // chosen.shape[-1]]
    outputs, start = [], 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            outputs.append(expert(inputs[start : start + count]))
            start += count
    return _weighted_sums(torch.cat(outputs), order, weights)


def mix_experts_grouped(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Sequence[nn.Module], stacks: ExpertStacks
) -> torch.Tensor:
    """`mix_experts` by grouped products; the number of tokens of each expert stays on the device."""
    order = chosen.flatten().argsort(stable=True)
    expert_of_row = chosen.flatten()[order]
    ends = torch.searchsorted(expert_of_row, torch.arange(len(stacks.up), device=x.device), right=True).int()
    hidden = _grouped_mm(x[order // chosen.shape[-1]], stacks.up.mT, offs=ends)
    if stacks.up_bias is not None:
        hidden = hidden + stacks.up_bias[expert_of_row]
    outputs = _grouped_mm(experts[0].gated(*hidden.chunk(2, dim=-1)), stacks.down.mT, offs=ends)
    if stacks.down_bias is not None:
        outputs = outputs + stacks.down_bias[expert_of_row]
    return _weighted_sums(outputs, order, weights)


def _weighted_sums(outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums (N, E) over each token's experts, of outputs (N K, E) whose row i belongs to token-expert pair `order[i]`."""
    by_token = outputs[order.argsort()].view(*weights.shape, -1)
    return (weights.to(outputs.dtype).unsqueeze(-2) @ by_token).squeeze(-2)


_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def can_group(x: torch.Tensor) -> bool:
    """Whether torch has a grouped product for inputs (N, E) of this dtype and device."""
    if _grouped_mm is None or x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return False
    capability = torch.cuda.get_device_capability(x.device)
    return capability >= (8, 0) if hasattr(F, "grouped_mm") else capability == (9, 0)


def stack_experts(experts: Sequence[nn.Module]) -> ExpertStacks | None:
    """Move the weights of experts into one tensor each; parameters keep their identity and become views of it.

    Returns None where experts are not made of plain linear layers, or rows are not aligned to 16 bytes.
    """
    linears = [(expert.fc_1, expert.fc_2, expert.proj) for expert in experts]
    first = linears[0][0].weight
    if any(type(linear) is not nn.Linear for layers in linears for linear in layers):
        return None
    if any(size * first.element_size() % 16 for size in first.shape):
        return None
    with torch.inference_mode(False), torch.no_grad():  # parameters outlive the call
        up = torch.stack([torch.cat((fc_1.weight, fc_2.weight)) for fc_1, fc_2, _ in linears])
        for (fc_1, fc_2, _), rows in zip(linears, up, strict=True):
            fc_1.weight.data, fc_2.weight.data = rows.chunk(2)
        down = torch.stack([proj.weight for _, _, proj in linears])
        for (_, _, proj), rows in zip(linears, down, strict=True):
            proj.weight.data = rows
        if linears[0][0].bias is None:
            return ExpertStacks(up, down, None, None)
        up_bias = torch.stack([torch.cat((fc_1.bias, fc_2.bias)) for fc_1, fc_2, _ in linears])
        down_bias = torch.stack([proj.bias for _, _, proj in linears])
        for (fc_1, fc_2, proj), up_row, down_row in zip(linears, up_bias, down_bias, strict=True):
            fc_1.bias.data, fc_2.bias.data = up_row.chunk(2)
            proj.bias.data = down_row
        return ExpertStacks(up, down, up_bias, down_bias)


_experts_by_key: "weakref.WeakValueDictionary[int, Experts]" = weakref.WeakValueDictionary()
_next_key = itertools.count()

_library = torch.library.Library("litgpt", "FRAGMENT")
_library.define("mix_experts(Tensor x, Tensor weights, Tensor chosen, int key) -> Tensor")
_library.impl(
    "mix_experts",
    lambda x, weights, chosen, key: mix_experts(x, weights, chosen, _experts_by_key[key]),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("litgpt::mix_experts", lambda x, weights, chosen, key: torch.empty_like(x), lib=_library)
