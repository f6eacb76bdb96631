"""Gradients through key-value caches, for training loops of one's own: one call a batch, and any optimizer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.loss import IGNORE_INDEX
from litgpt.train.model import TrainingModel, restore_forward, runs_as_it_is
from litgpt.train.teacher import Teacher


class SummedLoss(NamedTuple):
    """What `accumulate` returns."""

    loss: torch.Tensor  # the sum over counted tokens, without a graph
    n_tokens: int  # that were counted


def accumulate(
    model: GPT,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    spec: CacheSpec | str,
    *,
    chunk_size: int,
    prompt_chunksize: int | None = None,
    lengths: Sequence[int] | torch.Tensor | None = None,
    loss_scale: float = 1.0,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    teacher: Teacher | None = None,
    keep_inputs: str | int = "device",
    keep_loss: float = 0.0,
) -> SummedLoss:
    """Add to `.grad` of a model's parameters, those that want gradients, what a batch gives when every layer sees what its
    cache would have kept.

    Args:
        model: in training mode if dropout is wanted. Caches that it has are not touched.
        input_ids: tokens (B, T).
        labels: (B, T), the token that follows each, or -100 where it is not counted.
        spec: the caches, or their name.
        chunk_size: tokens of a row in each call after the first.
        prompt_chunksize: tokens of a row in the first call, which attends to all of them (None: `chunk_size`).
        lengths: how many of each row's first tokens there are (None: all); what follows them is padding.
        loss_scale: by what the loss is multiplied before gradients are taken, such as 1 / counted tokens of all batches.
        loss: summed loss of logits (n, V), in float32 or more, and labels (n,): of some of the counted tokens at a time (None:
            cross-entropy).
        teacher: whose next-token distributions are learned in place of labels, where these are counted.
        keep_inputs: where inputs of layers stay: see `CachedLayers`.
        keep_loss: how much a loss on what caches keep weighs: see `TrainingModel`.

    Raises:
        ValueError: for shapes or lengths that do not go together, for caches that cannot be trained through, and if no
            parameter wants gradients.
    """
    sizes = _sizes(input_ids, labels, lengths)
    if loss is not None and teacher is not None:
        raise ValueError("a loss of its own and a teacher do not go together: leave out one of them")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model wants gradients: call requires_grad_() on those to train")
    layers = CachedLayers(model, CacheSpec.parse(spec), chunk_size, keep_inputs, prompt_chunksize)
    packed = [torch.cat([row[:size] for row, size in zip(x, sizes, strict=True)])[None] for x in (input_ids, labels)]
    restore = runs_as_it_is(model)
    try:
        training = TrainingModel(model, cached_layers=layers, teacher=teacher, loss=loss, keep_loss=keep_loss)
        with torch.enable_grad():
            total = training(*packed, sizes)
            (total * loss_scale).backward()
    finally:
        if restore:
            restore_forward(model)
    return SummedLoss(total.detach(), int((packed[1] != IGNORE_INDEX).sum()))


def _sizes(input_ids: torch.Tensor, labels: torch.Tensor, lengths: Sequence[int] | torch.Tensor | None) -> list[int]:
    """Tokens of each row."""
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise ValueError(
            f"input_ids and labels must be of one shape (B, T), got {tuple(input_ids.shape)} and {tuple(labels.shape)}"
        )
    B, T = input_ids.shape
    sizes = [T] * B if lengths is None else [int(n) for n in lengths]
    if not B or len(sizes) != B or not all(1 <= n <= T for n in sizes):
        raise ValueError(f"lengths must be {B} numbers from 1 to {T}, got {sizes}")
    return sizes
