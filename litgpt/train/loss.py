"""Next-token loss whose logits never exist for a whole batch.

Letters: N counted tokens, E embedding size, V padded vocabulary size.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from litgpt.kernels.training import next_token_losses, replaces_logits

IGNORE_INDEX = -100
LOGITS_BYTES = 64 << 20  # logits that exist at a time, in float32 or as they are where a kernel takes them
LEAN_LOGITS_BYTES = 16 << 20  # where memory is what matters: the head's products take a quarter longer
TRAINED_LOGITS_BYTES = 128 << 20  # with a trained head, each chunk of which has a gradient as large as its weight
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Summed loss of logits (n, V) and labels (n,)."""


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of the N tokens at `places`. Gradients are computed chunk by chunk in the forward pass, right
    after each chunk's logits, and only scaled in the backward pass; not even that where `scale` says by what."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        places: torch.Tensor,
        head: Callable,
        chunk: int,
        tied: list[torch.Tensor] | None,
        differentiated: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
        scale: float | None,
        *params: torch.Tensor,
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        d_hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        d_params: list[torch.Tensor | None] = [None] * len(params)
        for start in range(0, len(places), chunk):
            part = slice(start, start + chunk)
            x = hidden[places[part]].requires_grad_(d_hidden is not None)
            with torch.enable_grad():
                logits = head(x)
            loss, d_logits = differentiated(logits.detach(), part)
            total += loss
            inputs = [x] * (d_hidden is not None) + list(params)
            found = list(torch.autograd.grad(logits, inputs, d_logits.to(logits.dtype)))
            if d_hidden is not None:
                d_hidden[places[part]] = found.pop(0)
            for i, gradient in enumerate(found):
                d_params[i] = gradient if d_params[i] is None else d_params[i].add_(gradient)
            del logits, d_logits  # before there are the next ones
        ctx.saved, ctx.tied, ctx.scale = (d_hidden, *d_params), tied, scale
        return total

    @staticmethod
    def backward(ctx, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.saved is None:
            raise RuntimeError("the gradients of this loss have been taken already: compute it anew")
        saved, ctx.saved = ctx.saved, None  # scaled in place: those of the head are as large as its weight
        if ctx.scale is None:
            saved = [None if d is None else d.mul_(d_total.to(d.dtype)) for d in saved]
        elif abs(d_total.item() - ctx.scale) > 1e-5 * abs(ctx.scale):
            raise RuntimeError(f"the loss was to be multiplied by {ctx.scale}, not by {d_total.item()}")
        d_hidden, *d_params = saved
        if ctx.tied is not None:
            ctx.tied.append(d_params[0])
            d_params[0] = None
        return d_hidden, *[None] * 6, *d_params


def _differentiated(
    logits: torch.Tensor,
    labels: torch.Tensor,
    form: torch.dtype,
    factor: float,
    own_loss: Loss | None,
    taught: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of logits (n, V) in precision `form`, and its gradients times `factor`, perhaps in place of the logits.
    `taught` are a teacher's logits."""
    if own_loss is not None:
        with torch.enable_grad():
            loss = own_loss(scores := logits.to(form).requires_grad_(), labels)
        d_scores = torch.autograd.grad(loss, scores)[0]
    elif taught is not None:
        loss, d_scores = _loss_of(logits.to(form), taught, True)
    elif (losses := next_token_losses(logits, labels, factor)) is not None:
        return losses.sum(), logits
    else:
        loss, d_scores = _loss_of(logits.to(form), labels[:, None], False)
    return loss.detach(), d_scores.mul_(factor)


def _loss_of(scores: torch.Tensor, targets: torch.Tensor, soft: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of logits (n, V), and its gradients in their place.

    Args:
        targets: labels (n, 1), or with `soft` a teacher's logits: then the loss is its distribution's divergence from this one.
    """
    shifted = torch.logsumexp(scores, dim=-1, keepdim=True)
    if not soft:
        loss = (shifted - scores.gather(1, targets)).sum()
        d_scores = torch.sub(scores, shifted, out=scores).exp_()
        return loss, d_scores.scatter_add_(1, targets, d_scores.new_full(targets.shape, -1.0))
    wanted = torch.log_softmax(targets.to(scores.dtype), dim=-1)
    logs = torch.sub(scores, shifted, out=scores)
    loss = F.kl_div(logs, wanted, reduction="sum", log_target=True)
    return loss, logs.exp_().sub_(wanted.exp_())


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
        return None, add_rows(d_weight, ids, d_rows), None


def add_rows(d_weight: torch.Tensor, ids: torch.Tensor, d_rows: torch.Tensor) -> torch.Tensor:
    """Add gradients of an embedding's rows (..., E) to that of its weight."""
    return d_weight.index_add_(0, ids.flatten(), d_rows.flatten(0, -2).to(d_weight.dtype))


def loss_sum(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    params: Sequence[torch.Tensor],
    vocabulary: int,
    tied: list[torch.Tensor] | None = None,
    teacher: tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    scale: float | None = None,
    own_loss: Loss | None = None,
    lean: bool = False,
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
        scale: what the loss will be multiplied by before its gradients are taken, for a head that adds to the gradients of
            its weights by itself (None: whatever it is).
        own_loss: another loss than the cross-entropy.
        lean: hold fewer logits at a time.

    Returns:
        A number in float32 (float64 where outputs are); 0, with zero gradients, if no token is counted.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    places = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    labels = labels[places]
    size = TRAINED_LOGITS_BYTES if params and scale is None else LEAN_LOGITS_BYTES if lean else LOGITS_BYTES
    bytes_of_number = hidden.element_size() if teacher is None and replaces_logits(hidden, vocabulary) else 4
    chunk = max(16, size // (bytes_of_number * vocabulary))
    chunk = -(-len(places) // max(1, -(-len(places) // chunk)))  # all about equally large
    form, factor = torch.promote_types(hidden.dtype, torch.float32), 1.0 if scale is None else scale
    if not len(places):
        return sum((p.sum() * 0.0 for p in params), hidden.sum() * 0.0).to(form)
    if not (torch.is_grad_enabled() and (hidden.requires_grad or params)):
        parts = zip(places.split(chunk), labels.split(chunk), strict=True)
        loss_of = own_loss or partial(F.cross_entropy, reduction="sum")
        return sum(loss_of(head(hidden[part]).to(form), y) for part, y in parts)

    outputs = None if teacher is None else teacher[0].flatten(0, -2)

    def differentiated(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        taught = None if teacher is None else teacher[1](outputs[places[part]])
        return _differentiated(logits, labels[part], form, factor, own_loss, taught)

    return _HeadLoss.apply(hidden, places, head, chunk, tied, differentiated, scale, *params)
