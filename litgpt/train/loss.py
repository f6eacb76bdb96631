"""Next-token loss whose logits never exist for a whole batch.

Letters: N counted tokens, E embedding size, V padded vocabulary size.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
LOGITS_BYTES = 32 << 20  # float32 logits that exist at a time


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of N tokens. Gradients are computed chunk by chunk in the forward pass, right after each
    chunk's logits, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, labels: torch.Tensor, head: Callable, chunk: int, *params: torch.Tensor
    ) -> torch.Tensor:
        form = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=form)
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        d_params: list[torch.Tensor | None] = [None] * len(params)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            x = hidden[part].detach().requires_grad_(d_hidden is not None)
            with torch.enable_grad():
                logits = head(x)
            scores, targets = logits.detach().to(form), labels[part, None]
            shifted = torch.logsumexp(scores, dim=-1, keepdim=True)
            total += (shifted - scores.gather(1, targets)).sum()
            d_logits = torch.sub(scores, shifted, out=scores if scores.dtype != logits.dtype else None).exp_()
            d_logits.scatter_add_(1, targets, d_logits.new_full(targets.shape, -1.0))
            inputs = [x] * (d_hidden is not None) + list(params)
            found = list(torch.autograd.grad(logits, inputs, d_logits.to(logits.dtype)))
            if d_hidden is not None:
                d_hidden[part] = found.pop(0)
            for i, gradient in enumerate(found):
                d_params[i] = gradient if d_params[i] is None else d_params[i].add_(gradient)
        ctx.save_for_backward(d_hidden, *d_params)
        return total

    @staticmethod
    def backward(ctx, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, *d_params = (
            None if saved is None else saved * d_total.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return d_hidden, None, None, None, *d_params


def loss_sum(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    params: Sequence[torch.Tensor],
    vocabulary: int,
) -> torch.Tensor:
    """Sum of the next-token losses over counted tokens.

    Args:
        hidden: final-norm outputs (..., E).
        labels: (...), the token that each output should foresee, or -100: not counted.
        head: logits (n, V) of outputs (n, E).
        params: parameters of the head that want gradients.
        vocabulary: V, by which the number of tokens at a time is chosen.

    Returns:
        A number in float32 (float64 where outputs are); 0, with zero gradients, if no token is counted.
    """
    counted = labels != IGNORE_INDEX
    hidden, labels = hidden[counted], labels[counted]
    chunk = max(16, LOGITS_BYTES // (4 * vocabulary))
    form = torch.promote_types(hidden.dtype, torch.float32)
    if not len(hidden):
        return sum((p.sum() * 0.0 for p in params), hidden.sum() * 0.0).to(form)
    if torch.is_grad_enabled() and (hidden.requires_grad or params):
        return _HeadLoss.apply(hidden, labels, head, chunk, *params)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return sum(F.cross_entropy(head(x).to(form), y, reduction="sum") for x, y in parts)
