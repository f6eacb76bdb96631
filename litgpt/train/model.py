"""A model with its loss: what is trained, as one module, so that wrappers for several devices see a whole forward pass."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.model import GPT, LLaMAMLP
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.loss import TiedEmbedding, loss_sum
from litgpt.train.products import linear, onednn_is_faster
from litgpt.train.teacher import Teacher


class _Recomputed(torch.autograd.Function):
    """A function of tensors, element by element, of which only the inputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            y = ctx.function(*inputs)
        return None, *torch.autograd.grad(y, inputs, d_y)


class TrainingModel(nn.Module):
    """A `GPT` whose forward pass gives the summed loss of next tokens. `restore_forward` makes it a plain one again.

    Args:
        gpt: the model.
        activation_checkpointing: keep only the inputs of layers for the backward pass, and compute the rest again then.
        cached_layers: runs the model through key-value caches, and keeps only the inputs of layers in any case.
        teacher: whose next-token distributions are learned in place of the labels, where these are counted. Without
            gradients, the loss is that of the labels.
    """

    def __init__(
        self,
        gpt: GPT,
        activation_checkpointing: bool = False,
        cached_layers: CachedLayers | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.gpt, self.cached_layers = gpt, cached_layers
        if activation_checkpointing and cached_layers is None:
            for block in gpt.transformer.h:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for module in gpt.modules():
            if isinstance(module, LLaMAMLP):
                module.gated = partial(_Recomputed.apply, module.gated)
            elif type(module) is nn.Linear and onednn_is_faster():
                module.forward = partial(linear, module)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, row_sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Sum of the losses of all counted tokens: see `loss_sum`.

        Args:
            input_ids: (B, T), or with `row_sizes` (1, N): rows of these sizes, one after the other.
            labels: of the same shape; the token that follows each, or -100 where it is not counted.
            row_sizes: tokens of each row.
        """
        teacher = None
        if self.teacher is not None and torch.is_grad_enabled():
            teacher = self.teacher(input_ids, row_sizes), self.teacher.logits
        gpt, heads, logits = self.gpt, [self.gpt.lm_head], self.gpt.logits
        head, embedding, tied = gpt.lm_head, gpt.transformer.wte, None
        weight = embedding.weight
        if getattr(head, "weight", None) is weight and weight.requires_grad and torch.is_grad_enabled():
            tied = []
            embedding.forward = lambda ids: TiedEmbedding.apply(ids, weight, tied)
        try:
            if self.cached_layers is None:
                hidden = gpt(input_ids, skip_lm_head=True, row_sizes=row_sizes)
            else:
                hidden, norm = self.cached_layers.last_outputs(input_ids, row_sizes), gpt.transformer.ln_f
                heads, logits = [head, norm], lambda x: gpt.logits(norm(x))  # for a few tokens at a time
        finally:
            vars(embedding).pop("forward", None)
        params = [p for module in heads for p in module.parameters() if p.requires_grad]
        return loss_sum(hidden, labels, logits, params, gpt.config.padded_vocab_size, tied, teacher)


def restore_forward(gpt: GPT) -> None:
    """Undo what a `TrainingModel` did to the modules of `gpt`."""
    for module in gpt.modules():
        for name in ("forward", "gated"):
            vars(module).pop(name, None)
