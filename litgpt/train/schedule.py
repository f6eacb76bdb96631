"""The learning rate over the steps of a run, and how many steps there are."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int, floor: float = 0.0) -> float:
    """What the learning rate is multiplied with in optimizer step `step` (from 0 on).

    It rises linearly to 1, which step `warmup_steps` has (the first step's is not 0), and falls along a cosine to `floor`,
    which the last step would reach if there were one more.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + 0.5 * (1.0 - floor) * (1.0 + math.cos(math.pi * progress))


def cosine_schedule(optimizer: Optimizer, warmup_steps: int, max_steps: int, min_lr: float = 0.0) -> LambdaLR:
    """A schedule for `optimizer`, advanced after every step: linear warm-up, then a cosine that ends at `min_lr`."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    floors = [min(1.0, min_lr / rate) if rate > 0 else 0.0 for rate in rates]
    limits = {"warmup_steps": warmup_steps, "max_steps": max_steps}
    return LambdaLR(optimizer, [partial(learning_rate_factor, **limits, floor=floor) for floor in floors])


def steps_of_run(
    steps_per_epoch: int | None,
    tokens_per_step: int | None,
    epochs: int | None = None,
    max_steps: int | None = None,
    max_tokens: int | None = None,
) -> int:
    """How many optimizer steps a run has: the least that its limits allow; `ValueError` if there are none, or no step is left.

    Args:
        steps_per_epoch: optimizer steps that the data makes (None: unknown, a stream).
        tokens_per_step: tokens of a step on average, over all devices (None: unknown).
    """
    if steps_per_epoch == 0:
        raise ValueError("the training data gives no batches")
    limits = [max_steps] if max_steps is not None else []
    if epochs is not None and steps_per_epoch is not None:
        limits.append(epochs * steps_per_epoch)
    if max_tokens is not None and tokens_per_step:
        limits.append(max_tokens // tokens_per_step)
    if not limits:
        raise ValueError("nothing says how long to train: give epochs, max_steps or max_tokens")
    if min(limits) < 1:
        raise ValueError(f"max_tokens={max_tokens} is less than the {tokens_per_step} tokens of a single step")
    return min(limits)
