"""The learning rate over the steps of a run, and how many steps there are."""

import math
from functools import partial

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from litgpt.args import TrainArgs
from litgpt.train.batches import n_batches


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


def steps_of_run(loader: DataLoader, train: TrainArgs, n_processes: int, longest: int) -> int:
    """How many optimizer steps a run on the batches of `loader` has: the least that its limits allow; `ValueError` if there are
    none, or no step is left. Rows that do not say how many tokens they have are taken to have `longest`."""
    batches = train.gradient_accumulation_iters(n_processes) * n_processes  # of a step
    limits = [train.max_steps] if train.max_steps is not None else []
    if train.epochs is not None and (per_epoch := n_batches(loader)) is not None:
        if not per_epoch:
            raise ValueError("the training data gives no batches")
        limits.append(train.epochs * math.ceil(per_epoch / batches))
    if train.max_tokens is not None:
        tokens = round(_tokens(loader, train.micro_batch_size, longest) * batches)
        limits.append(train.max_tokens // tokens)
        if limits[-1] < 1:
            raise ValueError(f"max_tokens={train.max_tokens} is less than the {tokens} tokens of a single step")
    if not limits:
        raise ValueError("nothing says how long to train: give epochs, max_steps or max_tokens")
    return min(limits)


def _tokens(loader: DataLoader, rows: int, longest: int) -> float:
    """Tokens of a batch, on average."""
    if lengths := getattr(loader.dataset, "lengths", None):
        return sum(lengths) / len(loader)
    if not isinstance(loader.dataset, IterableDataset) and isinstance(row := loader.dataset[0], torch.Tensor):
        return rows * (len(row) - 1)
    return rows * longest
