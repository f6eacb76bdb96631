"""The training loop: gradients, optimizer steps, validation, checkpoints, and resuming.

Words: a *window* is the micro-batches of one optimizer step, on all processes together; an *iteration* is one micro-batch
of this process. Every process goes through the same batches in the same order and takes its share of each window, so that
a run does not depend on how many processes share it, up to rounding.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from litgpt.args import EvalArgs, TrainArgs
from litgpt.pages import release_freed_memory
from litgpt.train.batches import FlatBatch, as_rows, n_batches, windows
from litgpt.train.checkpointing import random_state, set_random_state
from litgpt.train.loss import IGNORE_INDEX
from litgpt.train.report import Position, Reporter


@dataclass
class Loop:
    """Trains a model on batches, as `litgpt.train.batches` has them, until a limit is reached."""

    fabric: Fabric  # launched, and has set up the next two
    model: nn.Module  # a `TrainingModel`
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler  # advanced after every optimizer step
    train_loader: DataLoader
    val_loader: DataLoader | None
    train: TrainArgs
    eval: EvalArgs
    max_steps: int  # optimizer steps of the run
    save: Callable[[int], None]  # called in every process when a checkpoint of a step is due
    show_example: Callable[[], None] | None  # called after a validation

    def __post_init__(self) -> None:
        self.position, self.report = Position(), Reporter(self.fabric, self.train, self.max_steps)
        self._order: dict[str, Any] = {}  # random states that the order of this epoch's batches came from
        self.accumulation = self.train.gradient_accumulation_iters(self.fabric.world_size)

    # -- state

    def state(self) -> dict[str, Any]:
        """What a later `load_state` needs to resume exactly from here, next to weights, optimizer, schedule and random states."""
        return {"position": vars(self.position), "order": self._order}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from where `state` was taken, with the same data and options."""
        self.position, self._order = Position(**state["position"]), state["order"]

    # -- training

    def run(self) -> Position:
        """Train to the end of the run."""
        position, began = self.position, time.perf_counter() - self.position.seconds
        self.model.train()
        self.report.begin(position)
        while not self._finished:
            for window in windows(self._epoch(), self.accumulation * self.fabric.world_size):
                self._step(window)
                position.batches += len(window)
                position.seconds = time.perf_counter() - began
                self._after_step()
                if self._finished:
                    break
            else:
                if not position.batches:
                    raise ValueError("the training data gives no batches")
                position.epoch, position.batches = position.epoch + 1, 0
        if self._epochs_done:
            self.fabric.print(f"Number of epochs {self.train.epochs} reached, stopping training...")
        return position

    @property
    def _epochs_done(self) -> bool:
        """Whether the run has been through all its epochs."""
        whole = self.position.batches >= (n_batches(self.train_loader) or math.inf)
        return self.train.epochs is not None and self.position.epoch + whole >= self.train.epochs

    @property
    def _finished(self) -> bool:
        position, train = self.position, self.train
        return (
            position.step_count >= self.max_steps
            or self._epochs_done
            or (train.max_time is not None and position.seconds >= train.max_time)
            or (train.max_tokens is not None and position.tokens >= train.max_tokens)
            or (train.early_stopping is not None and position.worse >= train.early_stopping)
        )

    def _epoch(self) -> Iterator[Any]:
        """The batches that are left of this epoch."""
        if hasattr(self.train_loader, "current_epoch"):  # litdata's, which counts up from it, and shuffles by it
            self.train_loader.current_epoch = self.position.epoch
        loader = self.train_loader
        own = {"loader": loader.generator, "sampler": getattr(loader.sampler, "generator", None)}
        sources = {"torch": torch.default_generator} | {name: g for name, g in own.items() if g is not None}
        if not self.position.batches:
            self._order = {name: source.get_state() for name, source in sources.items()}
            return iter(loader)
        now = torch.get_rng_state()  # in the middle of an epoch: draw the same order again
        for name, source in sources.items():
            source.set_state(self._order[name])
        batches = iter(loader)
        for _ in range(self.position.batches):  # samplers draw with the first one
            next(batches, None)
        torch.set_rng_state(now)
        return batches

    def _step(self, window: list[Any]) -> None:
        """One optimizer step on a window: gradients of the mean loss of its counted tokens."""
        fabric, position = self.fabric, self.position
        rows = [as_rows(batch) for batch in window]
        own = _own_rows(fabric, rows)
        total, window_loss, seen = sum(_counted(labels) for _, labels, _ in rows), 0.0, 0
        for i, (ids, labels, sizes) in enumerate(own):
            began, last = time.perf_counter(), i == len(own) - 1
            with fabric.no_backward_sync(self.model, enabled=not last):
                scale = fabric.world_size / max(total, 1)
                loss = self.model(fabric.to_device(ids), fabric.to_device(labels), row_sizes=sizes, scale=scale)
                fabric.backward(loss * scale)
            position.iter_num += 1
            window_loss += loss.item()
            if not math.isfinite(window_loss):
                raise ValueError(
                    f"the loss is {loss.item()} in step {position.step_count + 1}: lower the learning rate, clip gradients "
                    "(train.max_norm), or use a precision with a wider range; earlier checkpoints are as they were"
                )
            seen += _counted(labels)
            done = rows[i * fabric.world_size : (i + 1) * fabric.world_size]
            position.tokens += sum(ids.shape[1] for ids, _, _ in done)
            position.samples += sum(len(sizes) for _, _, sizes in done)
            if last:
                self._update(total)
                window_loss, seen = float(fabric.all_reduce(torch.tensor(window_loss), reduce_op="sum")), total
            rate, part = self.scheduler.get_last_lr()[0], (i + 1) / len(own)
            self.report.iteration(position, window_loss, seen, time.perf_counter() - began, part, rate)
        position.counted += total

    def _update(self, counted: int) -> None:
        if counted:
            if self.train.max_norm is not None:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.train.max_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.position.step_count += 1

    def _after_step(self) -> None:
        """Validate and save where it is due."""
        position, train = self.position, self.train
        if self.val_loader is not None and position.step_count % self.eval.interval == 0:
            began = time.perf_counter()
            self.fabric.print("Validating ...")
            loss = self.validate()
            self.report.validation(position, loss, time.perf_counter() - began)
            if self.show_example is not None:
                self.show_example()
            self.fabric.barrier()
        if train.save_interval is not None and position.step_count % train.save_interval == 0:
            self.save(position.step_count)

    def validate(self, max_iters: int | None = None) -> float:
        """Mean loss of the counted tokens of the validation batches, `max_iters` (default: as the options say) at most."""
        return validate(self.fabric, self.model, self.val_loader, max_iters or self.eval.max_iters)


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, loader: DataLoader, max_iters: int | None = None) -> float:
    """Mean loss of the counted tokens of a loader's batches (NaN if there are none); random states stay as they are."""
    before, was_training = random_state(), model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # loss, and counted tokens
    for ids, labels, sizes in _own_rows(fabric, [as_rows(batch) for batch in islice(loader, max_iters)]):
        loss = model(fabric.to_device(ids), fabric.to_device(labels), row_sizes=sizes)
        total += torch.tensor([loss.item(), _counted(labels)], dtype=torch.float64)
    model.train(was_training)
    set_random_state(before)
    release_freed_memory()  # of logits: what training keeps would come to lie within it
    loss, counted = fabric.all_reduce(total, reduce_op="sum").tolist()
    return loss / counted if counted else math.nan


def _counted(labels: torch.Tensor) -> int:
    """Tokens that the loss counts."""
    return int((labels != IGNORE_INDEX).sum())


def _own_rows(fabric: Fabric, rows: list[FlatBatch]) -> list[FlatBatch]:
    """This process's share of batches. Where others have one more, one of which nothing is counted makes up for it: all processes
    go through the model equally often."""
    own = rows[fabric.global_rank :: fabric.world_size]
    if len(own) < math.ceil(len(rows) / fabric.world_size):
        ids, labels, sizes = rows[0]
        own.append((ids, torch.full_like(labels, IGNORE_INDEX), sizes))
    return own
