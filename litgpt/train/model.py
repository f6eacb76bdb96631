"""A model with its loss: what is trained, as one module, so that wrappers for several devices see a whole forward pass."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.model import GPT
from litgpt.train.loss import loss_sum


class TrainingModel(nn.Module):
    """A `GPT` whose forward pass gives the summed loss of next tokens.

    Args:
        gpt: the model.
        activation_checkpointing: keep only the inputs of layers for the backward pass, and compute the rest again then.
    """

    def __init__(self, gpt: GPT, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.gpt = gpt
        if activation_checkpointing:
            for block in gpt.transformer.h:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, row_sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Sum of the losses of all counted tokens: see `loss_sum`.

        Args:
            input_ids: (B, T), or with `row_sizes` (1, N): rows of these sizes, one after the other.
            labels: of the same shape; the token that follows each, or -100 where it is not counted.
            row_sizes: tokens of each row.
        """
        hidden = self.gpt(input_ids, skip_lm_head=True, row_sizes=row_sizes)
        params = [p for p in self.gpt.lm_head.parameters() if p.requires_grad]
        return loss_sum(hidden, labels, self.gpt.logits, params, self.gpt.config.padded_vocab_size)


def forget_activation_checkpointing(gpt: GPT) -> None:
    """Undo what a `TrainingModel` did to the layers of `gpt`."""
    for block in gpt.transformer.h:
        vars(block).pop("forward", None)
