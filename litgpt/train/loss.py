"""Next-token loss whose logits never exist for a whole batch.

Letters: N counted tokens, E embedding size, V padded vocabulary size.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
LOGITS_BYTES = 16 << 20  # float32 logits that exist at a time
TRAINED_LOGITS_BYTES = (
    128 << 20
)  # with a trained head, where every further chunk adds to a gradient as large as its weight


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of the N tokens at `places`. Gradients are computed chunk by chunk in the forward pass, right after each
    chunk's logits, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        places: torch.Tensor,
        labels: torch.Tensor,
        head: Callable,
        chunk: int,
        tied: list[torch.Tensor] | None,
        teacher: Callable[[torch.Tensor], torch.Tensor] | None,
        *params: torch.Tensor,
    ) -> torch.Tensor:
        form = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=form)
        d_hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        d_params: list[torch.Tensor | None] = [None] * len(params)
        for start in range(0, len(places), chunk):
            part = slice(start, start + chunk)
            x = hidden[places[part]].requires_grad_(d_hidden is not None)
            with torch.enable_grad():
                logits = head(x)
            scores, targets = logits.detach().to(form), labels[part, None]
            shifted = torch.logsumexp(scores, dim=-1, keepdim=True)
            if teacher is None:
                total += (shifted - scores.gather(1, targets)).sum()
                d_logits = torch.sub(scores, shifted, out=scores).exp_()
                d_logits.scatter_add_(1, targets, d_logits.new_full(targets.shape, -1.0))
            else:  # the divergence of the teacher's distribution from this one
                wanted = torch.log_softmax(teacher(places[part]).to(form), dim=-1)
                logs = torch.sub(scores, shifted, out=scores)
                total += F.kl_div(logs, wanted, reduction="sum", log_target=True)
                d_logits = logs.exp_().sub_(wanted.exp_())
            inputs = [x] * (d_hidden is not None) + list(params)
            found = list(torch.autograd.grad(logits, inputs, d_logits.to(logits.dtype)))
            if d_hidden is not None:
                d_hidden[places[part]] = found.pop(0)
            for i, gradient in enumerate(found):
                d_params[i] = gradient if d_params[i] is None else d_params[i].add_(gradient)
        ctx.saved, ctx.tied = (d_hidden, *d_params), tied
        return total

    @staticmethod
    def backward(ctx, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.saved is None:
            raise RuntimeError("the gradients of this loss have been taken already: compute it anew")
        saved, ctx.saved = ctx.saved, None  # scaled in place: those of the head are as large as its weight
        d_hidden, *d_params = (None if d is None else d.mul_(d_total.to(d.dtype)) for d in saved)
        if ctx.tied is not None:
            ctx.tied.append(d_params[0])
            d_params[0] = None
        return d_hidden, None, None, None, None, None, None, *d_params


class TiedEmbedding(torch.autograd.Function):
    """Rows of an embedding that is the head's weight too. To the head's gradient, which `loss_sum` has left in a list, those
    of the rows are added, instead of a second gradient of the weight's size."""

    @staticmethod
    def forward(ctx, ids: torch.Tensor, weight: torch.Tensor, tied: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.tied = tied
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, d_rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        d_weight = ctx.tied.pop() if ctx.tied else torch.zeros_like(weight)
        d_weight.index_add_(0, ids.flatten(), d_rows.flatten(0, -2).to(d_weight.dtype))
        return None, d_weight, None


def loss_sum(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    params: Sequence[torch.Tensor],
    vocabulary: int,
    tied: list[torch.Tensor] | None = None,
    teacher: tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Sum of the next-token losses over counted tokens, or of their divergences from what a teacher says.

    Args:
        hidden: what the head takes, (..., E).
        labels: (...), the token that each output should foresee, or -100: not counted.
        head: logits (n, V) of outputs (n, E).
        params: parameters of the head that want gradients, that of its weight first.
        vocabulary: V, by which the number of tokens at a time is chosen.
        teacher: outputs (..., E) of another model, and its logits of them: the loss is the Kullback-Leibler divergence of its
            distribution of the next token from this one's, where gradients are wanted.
        tied: the list that a `TiedEmbedding` before `hidden` was given: for the gradient of the first of `params`.

    Returns:
        A number in float32 (float64 where outputs are); 0, with zero gradients, if no token is counted.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    places = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    labels = labels[places]
    chunk = max(16, (TRAINED_LOGITS_BYTES if params else LOGITS_BYTES) // (4 * vocabulary))
    form = torch.promote_types(hidden.dtype, torch.float32)
    if not len(places):
        return sum((p.sum() * 0.0 for p in params), hidden.sum() * 0.0).to(form)
    if torch.is_grad_enabled() and (hidden.requires_grad or params):
        says = None
        if teacher is not None:
            outputs, teacher_head = teacher[0].flatten(0, -2), teacher[1]
            says = lambda part: teacher_head(outputs[part])  # noqa: E731
        return _HeadLoss.apply(hidden, places, labels, head, chunk, tied, says, *params)
    parts = zip(places.split(chunk), labels.split(chunk), strict=True)
    return sum(F.cross_entropy(head(hidden[part]).to(form), y, reduction="sum") for part, y in parts)
