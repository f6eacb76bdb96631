"""A training run: a model, data and options go in, a trained model in a folder that every other command takes comes out."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import yaml
from lightning import Fabric
from lightning.fabric.loggers import CSVLogger

import litgpt.train.checkpointing as checkpointing
from litgpt.args import TrainArgs
from litgpt.atomic_file import only_writer, remove_abandoned_folders, replacing_folder
from litgpt.checkpoint.base import WEIGHTS_NAME
from litgpt.checkpoint.load import save_config
from litgpt.config import Config
from litgpt.engine import Engine, Sampling, Sequence, decode, prepare_caches
from litgpt.errors import is_out_of_memory
from litgpt.kvcache.memory import as_text, available_bytes
from litgpt.model import GPT
from litgpt.pages import release_freed_memory
from litgpt.prompts import save_prompt_style
from litgpt.runners.huge_pages import use_huge_pages
from litgpt.runners.quantized_weights import num_parameters
from litgpt.tokenizer import Tokenizer
from litgpt.train.batches import n_batches
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.loop import Loop
from litgpt.train.methods import Method
from litgpt.train.model import TrainingModel
from litgpt.train.optimizers import make_optimizer, reserve_state
from litgpt.train.options import Options
from litgpt.train.report import curve_svg
from litgpt.train.schedule import cosine_schedule, steps_of_run
from litgpt.train.step_memory import StepMemory
from litgpt.train.teacher import Teacher

VERIFIED_BATCHES = 2  # of the validation that goes before everything else


def connect(
    fabric: Fabric, data: Any, tokenizer: Tokenizer | None, train: TrainArgs, config: Config
) -> tuple[Any, Any]:
    """Loaders of training and validation batches; the first process prepares files for all. `ValueError` if the samples would be
    longer than the model's context, or the data cannot be packed."""
    limit = train.max_seq_length or config.block_size
    if limit > config.block_size:
        raise ValueError(f"train.max_seq_length={limit} is more than the model's context of {config.block_size} tokens")
    if hasattr(data, "pack"):
        data.pack = train.pack
    elif train.pack:
        raise ValueError(f"train.pack: {type(data).__name__} gives batches of its own, which cannot be packed")
    data.connect(tokenizer=tokenizer, batch_size=train.micro_batch_size, max_seq_length=limit)
    with fabric.rank_zero_first():
        data.prepare_data()
        data.setup()
    return data.train_dataloader(), data.val_dataloader()


@dataclass
class Run:
    """A run: a model that is prepared for its method, data, and where it all goes."""

    fabric: Fabric  # launched
    gpt: GPT  # with the modules of `method` in place, weights on the device
    config: Config  # without what the method adds
    method: Method
    options: Options  # with the data module, connected
    loaders: tuple[Any, Any]  # of training and validation batches
    save_tokenizer: Callable[[Path], None] | None  # and what else belongs into the folder of a checkpoint
    tokenizer: Tokenizer | None = None  # without it, no examples are shown

    def run(self, resume: Path | None = None) -> dict[str, float]:
        """Train, validate, save. Returns metrics: losses, steps, tokens, seconds, tokens per second."""
        status, out_dir = "failed", self.options.out_dir
        writes = out_dir is not None and self.fabric.is_global_zero
        try:
            with only_writer(out_dir) if writes else nullcontext():
                if writes:
                    remove_abandoned_folders(out_dir, "step-*")
                metrics = self._run(resume)
            status = "success"
        except KeyboardInterrupt:
            if out_dir is not None and (steps := checkpointing.step_folders(out_dir)):
                self.fabric.print(f"Interrupted: the same command with --resume auto goes on from {steps[-1]}")
            raise
        finally:
            for logger in self.fabric.loggers:
                logger.finalize(status)
        return metrics

    def _run(self, resume: Path | None) -> dict[str, float]:
        fabric, evaluation = self.fabric, self.options.eval
        self._set_up(resume is None)
        loop = self.loop
        if resume is not None:
            fabric.print(f"Resuming training from {resume}")
            self.load(resume)
            if loop.position.batches:
                fabric.print(f"Resuming dataset: {loop.position.batches} / {n_batches(loop.train_loader) or '?'}")
        validates = loop.val_loader is not None
        if validates and evaluation.initial_validation:
            fabric.print("Validating ...")
            fabric.print(f"Initial evaluation | val loss: {loop.validate():.3f}")
        elif validates:
            fabric.print("Verifying settings ...")
            loop.validate(VERIFIED_BATCHES)
        for logger in fabric.loggers:
            if not isinstance(logger, CSVLogger):  # which has no place for settings
                logger.log_hyperparams(self.options.hyperparameters)
        try:
            loop.run()
        except (RuntimeError, MemoryError) as error:
            if self.options.kv_cache is not None and is_out_of_memory(error):
                raise RuntimeError(self._does_not_fit(None)) from error
            raise
        if validates and evaluation.final_validation:
            fabric.print("Validating ...")
            loop.report.validation(loop.position, loop.validate(), None)
        metrics = loop.report.summary(loop.position)
        self.save_final()
        return metrics

    def _set_up(self, from_start: bool) -> None:
        """The model with its loss, the optimizer and the loop, on their devices."""
        fabric, options, train = self.fabric, self.options, self.options.train
        fabric.print(f"Number of trainable parameters: {num_parameters(self.gpt, True):,}")
        if not self.method.trains_all:
            fabric.print(f"Number of non-trainable parameters: {num_parameters(self.gpt, False):,}")
        cached = teacher = None
        if (spec := options.cache_spec()) is not None:
            left = available_bytes(fabric.device)
            if left is not None and (problem := self._does_not_fit(left)):
                raise ValueError(problem)
            cached = CachedLayers(self.gpt, spec, options.prompt_chunksize, train.keep_inputs)
        if train.teacher is not None:
            teacher = Teacher(self.gpt, options.prompt_chunksize)
        checkpoints = train.activation_checkpointing
        self.model = TrainingModel(self.gpt, checkpoints, cached, teacher, keep_loss=train.keep_loss)
        model = fabric.setup_module(self.model)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{self.method.name} trains nothing in {self.config.name}: check its options")
        self.optimizer = make_optimizer(options.optimizer, trained)
        if fabric.world_size == 1 and fabric.device.type == "cpu":
            self.model.keep_gradients()
            use_huge_pages(self.gpt)
            if from_start:
                reserve_state(self.optimizer)
        optimizer = fabric.setup_optimizers(self.optimizer)
        max_steps = steps_of_run(self.loaders[0], train, fabric.world_size, self._longest)
        warmup = asked = round((train.lr_warmup_fraction or 0) * max_steps) or train.lr_warmup_steps or 0
        if asked >= max_steps:
            warmup = max_steps // 10
            fabric.print(f"The run has {max_steps} steps: warming up for {warmup} instead of {asked}")
        scheduler = cosine_schedule(optimizer, warmup, max_steps, train.min_lr)
        show = self.show_example if options.eval.max_new_tokens and self.tokenizer is not None else None
        parts = (model, optimizer, scheduler, *self.loaders, train, options.eval, max_steps)
        self.loop = Loop(fabric, *parts, self.save_step, show)
        if self._lengths:
            fabric.print(
                f"The longest sequence length in the train data is {max(self._lengths)}, the model's maximum sequence length is "
                f"{min(max(self._lengths), self._longest)} and context length is {self.config.block_size}"
            )

    @property
    def _longest(self) -> int:
        """Tokens that a row of a batch may have."""
        return self.options.train.max_seq_length or self.config.block_size

    @property
    def _lengths(self) -> list[int] | None:
        """Tokens of the samples, where they are known."""
        return getattr(self.loaders[0].dataset, "lengths", None)

    def _does_not_fit(self, left: int | None) -> str | None:
        """That the largest batch does not fit, and the options that help. None: it fits into the memory that is `left`, if that
        is known."""
        gpt, train, length = self.gpt, self.options.train, self._longest
        if self._lengths and not train.pack:
            length = min(length, max(self._lengths))
        trained_head = any(p.requires_grad for p in gpt.lm_head.parameters())
        numbers = (train.micro_batch_size, length, self.options.prompt_chunksize)
        step = StepMemory(gpt.config, self.options.cache_spec(), *numbers, gpt.dtype, trained_head)
        needed, known = step.total(train.keep_inputs), "" if left is None else f", and {as_text(left)} are left"
        if left is not None and needed <= left:
            return None
        remedy = step.remedy(needed * 9 // 10 if left is None else left, self.fabric.device.type == "cpu")
        return (
            f"a batch of {step.rows} x {step.length:,} tokens does not fit: it needs about {as_text(needed)} beside the model"
            f"{known}; what helps is {remedy}"
        )

    # -- checkpoints

    def save_step(self, step: int) -> None:
        """Write a checkpoint to resume from, and remove old ones as `train.keep_last` says."""
        out_dir, loop = self.options.out_dir, self.loop
        if out_dir is None:
            return
        random = own = [checkpointing.random_state()]
        if self.fabric.world_size > 1:
            random = own * self.fabric.world_size
            torch.distributed.all_gather_object(random, own[0])
        state = {
            "optimizer": checkpointing.optimizer_state(self.model, self.optimizer),
            "scheduler": loop.scheduler.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the scale of losses in 16-mixed
            "iter_num": loop.position.iter_num,
            "step_count": step,
            "loop": loop.state(),
            "random": random,
            "method": self.method.name,
            "model_name": self.config.name,
        }
        digits = self.options.step_digits
        self._write(out_dir / f"step-{step:0{digits}d}", state)
        if self.fabric.is_global_zero:
            checkpointing.remove_old(out_dir, self.options.train.keep_last, dict(loop.position.val_losses))

    def save_final(self) -> None:
        """Write the trained weights, and a picture of the losses."""
        out_dir = self.options.out_dir
        if out_dir is None:
            return
        self._write(out_dir / "final", {})
        if self.fabric.is_global_zero:
            (out_dir / "logs").mkdir(exist_ok=True)
            picture, position = out_dir / "logs" / "loss.svg", self.loop.position
            curves = {"train": position.losses, "validation": position.val_losses}
            picture.write_text(curve_svg(curves), encoding="utf-8")
            self.fabric.print(f"The losses as a picture: {picture}")

    def _write(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write the trained weights, `state`, and all that belongs to a checkpoint. All processes call it."""
        release_freed_memory()  # of activations: saving takes some, too
        weights = checkpointing.full_tensors(self.gpt, self.method.is_trained)
        if self.fabric.is_global_zero:
            self.fabric.print(self.method.saving(folder / f"{WEIGHTS_NAME}{self.method.suffix}"))
            try:
                with replacing_folder(folder) as temporary:
                    torch.save({"model": weights, **state}, temporary / (WEIGHTS_NAME + self.method.suffix))
                    text = yaml.safe_dump(self.options.hyperparameters, sort_keys=False, allow_unicode=True)
                    (temporary / "hyperparameters.yaml").write_text(text, encoding="utf-8")
                    save_config(self.config, temporary)
                    if self.save_tokenizer is not None:
                        self.save_tokenizer(temporary)
                    if (style := getattr(self.options.data, "prompt_style", None)) is not None:
                        save_prompt_style(style, temporary)
            except OSError as error:
                last = checkpointing.step_folders(folder.parent)
                kept = f"; the last complete checkpoint is {last[-1]}" if last else ""
                reason = f"{folder} could not be written: {error.strerror}" if error.strerror else error
                raise OSError(f"{reason}{kept}") from None
        self.fabric.barrier()

    def load(self, path: Path) -> None:
        """Resume from a step checkpoint; `ValueError` if it is of another model or method, or not of a step."""
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if "loop" not in state:
            raise ValueError(f"--resume: {path} holds weights only; give the file of a step-* folder")
        for name, own in (("method", self.method.name), ("model_name", self.config.name)):
            if state[name] != own:
                raise ValueError(f"--resume: {path} is of {name}={state[name]!r}, this run of {own!r}")
        try:
            checkpointing.load_parameters(self.gpt, state["model"])
            checkpointing.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        except ValueError as error:
            raise ValueError(f"--resume: {path}: {error}") from None
        self.loop.scheduler.load_state_dict(state["scheduler"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.loop.load_state(state["loop"])
        random = state["random"]
        checkpointing.set_random_state(random[self.fabric.global_rank if len(random) == self.fabric.world_size else 0])

    # -- examples

    def show_example(self) -> None:
        """Show what the model says to a validation sample."""
        dataset = getattr(self.loop.val_loader, "dataset", None)
        if checkpointing.is_divided(self.gpt) or not hasattr(dataset, "example"):
            return
        which, before = self.options.eval.evaluate_example, checkpointing.random_state()
        index = 0 if which == "first" else torch.randint(len(dataset), ()).item() if which == "random" else int(which)
        prompt, ids = dataset.example(index % len(dataset))
        show_answer(self.fabric, self.gpt, self.tokenizer, prompt, ids, self.options.eval.max_new_tokens)
        checkpointing.set_random_state(before)


def show_answer(
    fabric: Fabric, gpt: GPT, tokenizer: Tokenizer, prompt: str, ids: torch.Tensor, max_new_tokens: int
) -> None:
    """Print `prompt`, whose tokens are `ids` (T,), and what the model says to it."""
    was_training = gpt.training
    gpt.eval()
    fabric.print(prompt)
    room = min(max_new_tokens, gpt.max_seq_length - len(ids))
    if room > 0:
        answer = Sequence(ids.to(fabric.device), room, Sampling(0.8), [[i] for i in tokenizer.eos_ids])
        prepare_caches(gpt, 1, answer.max_length)
        for _ in decode(Engine(gpt), [answer]):
            pass
        fabric.print(f"{tokenizer.decode(answer.output)}\n")
    gpt.clear_kv_caches()
    gpt.train(was_training)
