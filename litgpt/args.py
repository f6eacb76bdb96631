"""The options of training commands, in groups: `--train.x`, `--eval.x`, `--log.x`."""

import math
import warnings
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class TrainArgs:
    """How to train.

    Attributes:
        save_interval: optimizer steps between checkpoints (None: only the final one).
        log_interval: iterations (micro-batches) between progress lines.
        global_batch_size: samples of an optimizer step, over all devices.
        micro_batch_size: samples that go through the model at once on one device.
        lr_warmup_steps: optimizer steps until the learning rate is reached.
        lr_warmup_fraction: the same, as a fraction of all steps; give one of the two.
        epochs: times that the data is gone through.
        max_tokens: tokens to train on, over all devices.
        max_steps: most optimizer steps.
        max_time: seconds after which training stops.
        max_seq_length: samples are cut to that many tokens (None: the model's context).
        tie_embeddings: train the embedding and the head as one weight (None: as the checkpoint has them).
        max_norm: gradients are clipped to this norm (None: not).
        min_lr: the learning rate at the end of the cosine schedule.
        pack: fill the rows of a batch with several samples up to `max_seq_length` tokens. No sample sees another.
        activation_checkpointing: keep only the inputs of layers for the backward pass, and compute the rest again.
        keep_inputs: with `--kv_cache`, where the inputs of layers stay until the backward pass: device, cpu or disk; or a number
            k: on the device those of every k-th layer, and the layers between run again.
        teacher: dense: learn what the same model says with a cache that keeps everything and without its LoRA matrices or
            adapters, token by token, instead of the data's next tokens (self-distillation; with `--kv_cache`).
        keep_loss: with a `--kv_cache` that keeps tokens by the attention they get: how much a loss on what it keeps weighs beside that
            of next tokens, such as 5 (0: there is none).
        keep_last: keep only this many of the step checkpoints, the best one besides (None: all).
        early_stopping: stop after this many validations in a row without a better loss (None: never).
    """

    save_interval: int | None = 1000
    log_interval: int = 1
    global_batch_size: int = 64
    micro_batch_size: int = 4
    lr_warmup_steps: int | None = 100
    lr_warmup_fraction: float | None = None
    epochs: int | None = None
    max_tokens: int | None = None
    max_steps: int | None = None
    max_time: float | None = None
    max_seq_length: int | None = None
    tie_embeddings: bool | None = None
    max_norm: float | None = None
    min_lr: float = 6e-5
    pack: bool = False
    activation_checkpointing: bool = False
    keep_inputs: Literal["device", "cpu", "disk"] | int = "device"
    teacher: Literal["dense"] | None = None
    keep_loss: float = 0.0
    keep_last: int | None = None
    early_stopping: int | None = None

    def __post_init__(self) -> None:
        fraction, warmup_steps = self.lr_warmup_fraction or 0.0, self.lr_warmup_steps or 0
        if fraction and warmup_steps:
            raise ValueError(
                f"Can't provide both `--train.lr_warmup_fraction` ({fraction}) and `--train.lr_warmup_steps` "
                f"({warmup_steps}): set one of them to 0"
            )
        if not 0 <= fraction <= 1:
            raise ValueError(f"lr_warmup_fraction must be between 0 and 1, got {fraction}")
        if self.teacher not in (None, "dense"):
            raise ValueError(f"teacher must be dense, got {self.teacher!r}")
        places, kept = ("device", "cpu", "disk"), self.keep_inputs
        if kept not in places and not (isinstance(kept, int) and kept >= 1):
            raise ValueError(f"keep_inputs must be {', '.join(places)} or a number of layers, got {kept!r}")
        for name in ("save_interval", "log_interval", "global_batch_size", "micro_batch_size", "epochs", "max_tokens"):
            self._require_positive(name)
        for name in ("max_steps", "max_time", "max_seq_length", "max_norm", "keep_last", "early_stopping"):
            self._require_positive(name)
        for name, value in (("lr_warmup_steps", warmup_steps), ("min_lr", self.min_lr), ("keep_loss", self.keep_loss)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.max_steps and warmup_steps >= self.max_steps:
            warnings.warn(
                f"lr_warmup_steps ({warmup_steps}) is not less than max_steps ({self.max_steps}): the run warms up for a tenth of "
                "its steps instead",
                stacklevel=3,
            )

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")

    def batch_size(self, devices: int, num_nodes: int = 1) -> int:
        """Samples of an optimizer step on one device."""
        size, rest = divmod(self.global_batch_size, devices * num_nodes)
        if not size or rest:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of the {devices * num_nodes} devices"
            )
        return size

    def gradient_accumulation_iters(self, devices: int, num_nodes: int = 1) -> int:
        """Micro-batches of an optimizer step on one device."""
        count, rest = divmod(self.batch_size(devices, num_nodes), self.micro_batch_size)
        if not count or rest:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of micro_batch_size="
                f"{self.micro_batch_size} times {devices * num_nodes} devices"
            )
        return count

    def warmup_iters(self, devices: int, num_nodes: int, max_iters: int, train_dataloader: Sized) -> int:
        """Micro-batches of the warm-up on one device."""
        iters = 0
        if self.lr_warmup_fraction:
            iters = math.ceil(len(train_dataloader) * self.lr_warmup_fraction)
        elif self.lr_warmup_steps:
            iters = self.gradient_accumulation_iters(devices, num_nodes) * self.lr_warmup_steps
        return min(iters, max_iters)


@dataclass
class EvalArgs:
    """How to validate.

    Attributes:
        interval: optimizer steps between validations.
        max_new_tokens: tokens of the example answer that is shown at each validation (None: no example).
        max_iters: most batches of a validation (None: all).
        initial_validation: validate before the first step.
        final_validation: validate after the last one.
        evaluate_example: which validation sample the example is: "first", "random", or its index.
    """

    interval: int = 600
    max_new_tokens: int | None = None
    max_iters: int | None = 100
    initial_validation: bool = False
    final_validation: bool = True
    evaluate_example: Literal["first", "random"] | int = "first"

    def __post_init__(self) -> None:
        example = self.evaluate_example if isinstance(self.evaluate_example, int) else None
        limits = {"interval": (self.interval, 1), "max_iters": (self.max_iters, 1)}
        limits |= {"max_new_tokens": (self.max_new_tokens, 0), "evaluate_example": (example, 0)}
        for name, (value, least) in limits.items():
            if value is not None and value < least:
                raise ValueError(f"eval.{name} must be at least {least}, got {value}")


@dataclass
class LogArgs:
    """Settings of loggers that need an account.

    Attributes:
        project, run, group: where Weights & Biases and MLflow put the run.
        teamspace, metadata, log_model, save_logs, checkpoint_name: accepted for scripts written for LitGPT; of its own
            logger, which is not here.
    """

    project: str | None = None
    run: str | None = None
    group: str | None = None
    teamspace: str | None = None
    metadata: dict[str, Any] | None = None
    log_model: bool = False
    save_logs: bool = True
    checkpoint_name: str | None = None
