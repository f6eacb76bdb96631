"""Fine-tuning: from options to a tuned model in a folder that every other command takes."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import yaml
from lightning import Fabric

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.checkpoint.base import CONFIG_NAME, WEIGHTS_NAME, Checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.prompts import save_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.train.checkpointing import (
    find_resume_path,
    full_tensors,
    random_state,
    remove_old,
    replacing_folder,
    set_random_state,
    step_folders,
)
from litgpt.train.loop import Loop, Position
from litgpt.train.methods import METHODS, Method
from litgpt.train.model import TrainingModel
from litgpt.train.optimizers import make_optimizer, resolve_optimizer
from litgpt.train.report import Reporter
from litgpt.train.schedule import cosine_schedule, steps_of_run
from litgpt.train.setting import compute_dtype, make_fabric, make_logger, number_of_parameters, parse_devices, plain

VERIFIED_BATCHES = 2  # of the validation that goes before everything else


@dataclass
class Options:
    """What a fine-tuning run is told, apart from the model, the data and the method. Fields are as in the commands."""

    out_dir: Path | None = None
    precision: str | None = None
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    resume: bool | str | Path = False
    train: TrainArgs = field(default_factory=lambda: TrainArgs(global_batch_size=16, micro_batch_size=1, epochs=5))
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=100, max_new_tokens=100))
    log: LogArgs = field(default_factory=LogArgs)
    optimizer: str | Mapping[str, Any] = "AdamW"
    logger_name: str = "csv"
    seed: int = 1337


def finetune_command(method: str, arguments: Mapping[str, Any]) -> dict[str, float]:
    """What the commands `finetune_*` do.

    Args:
        method: full, lora, adapter or adapter_v2.
        arguments: of the command's `setup`, by name.

    Returns:
        The run's metrics.
    """
    arguments = dict(arguments)
    access_token = arguments.pop("access_token", None)
    options = Options(**{f.name: arguments[f.name] for f in fields(Options) if f.name in arguments})
    options.out_dir = artifacts_dir(Path(options.out_dir))
    data = arguments["data"]
    if data is None:
        from litgpt.data import Alpaca

        data = Alpaca()
    hyperparameters = {name: plain(value) for name, value in arguments.items() if value is not None}
    way = METHODS[method]
    settings = {name: value for name, value in arguments.items() if name.startswith(f"{method}_")}
    check_options(options, way, arguments.get("quantize"))
    path = find_checkpoint(arguments["checkpoint_dir"], access_token)
    checkpoint = open_checkpoint(path)
    if checkpoint.quantization is not None and way.trains_all:
        raise ValueError(f"{path} is quantised: full fine-tuning needs plain weights; use finetune_lora")
    resume = find_resume_path(options.resume, options.out_dir, way.suffix)
    check_out_dir(options.out_dir, resume)
    logger = make_logger(
        options.logger_name,
        options.out_dir,
        f"finetune-{checkpoint.config.name}",
        options.train.log_interval,
        options.log,
        resume is not None,
    )
    fabric = make_fabric(
        options.devices, options.num_nodes, options.precision, options.strategy, logger, checkpoint.config
    )
    hyperparameters["precision"] = _precision(fabric)

    def main(fabric: Fabric) -> dict[str, float]:
        fabric.seed_everything(options.seed)
        tokenizer = checkpoint.tokenizer()
        loaders = connect(fabric, data, tokenizer, options.train, checkpoint.config)
        gpt = load_model(
            checkpoint, compute_dtype(_precision(fabric)), fabric.device, quantize=arguments.get("quantize")
        )
        if options.train.tie_embeddings is not False and checkpoint.tied:
            gpt.lm_head.weight = gpt.transformer.wte.weight
        elif options.train.tie_embeddings is False and gpt.lm_head.weight is gpt.transformer.wte.weight:
            gpt.lm_head.weight = torch.nn.Parameter(gpt.transformer.wte.weight.detach().clone())
        config = way.config(**{**asdict_shallow(checkpoint.config), **settings})
        way.prepare(gpt, config)
        run = Finetuning(fabric, gpt, way, tokenizer, data, loaders, options, checkpoint, hyperparameters)
        return run.run(resume)

    return fabric.launch(main)


def artifacts_dir(out_dir: Path) -> Path:
    """`out_dir`, below the folder that LIGHTNING_ARTIFACTS_DIR names if it is relative."""
    root = os.getenv("LIGHTNING_ARTIFACTS_DIR")
    return Path(root) / out_dir if root and not out_dir.is_absolute() else out_dir


def asdict_shallow(config: Config) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.init}


def _precision(fabric: Fabric) -> str:
    return str(fabric._precision.precision)


def check_options(options: Options, method: Method, quantize: str | None) -> None:
    """Refuse what cannot work before anything is read, fetched or written."""
    train = options.train
    if train.epochs is None and train.max_steps is None and train.max_tokens is None:
        raise ValueError("nothing says how long to train: give train.epochs, train.max_steps or train.max_tokens")
    train.gradient_accumulation_iters(parse_devices(options.devices), options.num_nodes)
    if quantize is not None and method.trains_all:
        raise ValueError(f"quantize={quantize!r}: full fine-tuning needs plain weights; use finetune_lora")
    resolve_optimizer(options.optimizer)


def check_out_dir(out_dir: Path, resume: Path | None) -> None:
    """Refuse a folder that holds another run: nothing of it is to be overwritten."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out_dir {out_dir} is a file: give a folder")
    found = [path.name for path in step_folders(out_dir)] + (["final"] if (out_dir / "final").exists() else [])
    if resume is None and found:
        raise ValueError(
            f"{out_dir} holds a run already ({found[-1]}): give another --out_dir, or --resume auto to go on with it"
        )


def connect(fabric: Fabric, data: Any, tokenizer: Tokenizer, train: TrainArgs, config: Config) -> tuple[Any, Any]:
    """Loaders of training and validation batches; only one process at a time prepares files."""
    limit = min(train.max_seq_length or config.block_size, config.block_size)
    if train.max_seq_length is not None and train.max_seq_length > config.block_size:
        raise ValueError(
            f"train.max_seq_length={train.max_seq_length} is more than the model's context of {config.block_size} tokens"
        )
    if train.pack and not hasattr(data, "pack"):
        raise ValueError(f"train.pack: {type(data).__name__} gives batches of its own, which cannot be packed")
    if hasattr(data, "pack"):
        data.pack = train.pack
    data.connect(tokenizer=tokenizer, batch_size=train.micro_batch_size, max_seq_length=limit)
    with fabric.rank_zero_first():
        data.prepare_data()
    data.setup()
    return data.train_dataloader(), data.val_dataloader()


class Finetuning:
    """A fine-tuning run: a model that is prepared for its method, data, and where it all goes.

    Args:
        fabric: launched.
        gpt: with the modules of `method` in place, weights on the device.
        method: how it is fine-tuned.
        tokenizer: of the model.
        data: the data module, connected.
        loaders: of training and validation batches.
        options: of the run.
        source: the checkpoint that the model came from, whose side files go into every folder (None: out of memory).
        hyperparameters: what `hyperparameters.yaml` is to say.
    """

    def __init__(
        self,
        fabric: Fabric,
        gpt: GPT,
        method: Method,
        tokenizer: Tokenizer,
        data: Any,
        loaders: tuple[Any, Any],
        options: Options,
        source: Checkpoint | None,
        hyperparameters: Mapping[str, Any],
    ) -> None:
        self.fabric, self.gpt, self.method, self.tokenizer = fabric, gpt, method, tokenizer
        self.data, self.loaders, self.options, self.source = data, loaders, options, source
        self.hyperparameters = hyperparameters
        self.report = Reporter(fabric, options.train.log_interval)

    def run(self, resume: Path | None = None) -> dict[str, float]:
        """Train, validate, save. Returns metrics: losses, steps, tokens, seconds, tokens per second."""
        fabric, options, train = self.fabric, self.options, self.options.train
        fabric.print(f"Number of trainable parameters: {number_of_parameters(self.gpt, True):,}")
        if not self.method.trains_all:
            fabric.print(f"Number of non-trainable parameters: {number_of_parameters(self.gpt, False):,}")
        model = fabric.setup_module(TrainingModel(self.gpt, train.activation_checkpointing))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = fabric.setup_optimizers(make_optimizer(options.optimizer, trained))
        train_loader, val_loader = self.loaders
        accumulation = train.gradient_accumulation_iters(fabric.world_size) * fabric.world_size
        max_steps = steps_of_run(
            -(-len(train_loader) // accumulation), None, train.epochs, train.max_steps, train.max_tokens
        )
        warmup = train.lr_warmup_steps or 0
        if train.lr_warmup_fraction:
            warmup = round(train.lr_warmup_fraction * max_steps)
        if warmup >= max_steps:
            warmup = max_steps // 10
            fabric.print(f"lr_warmup_steps is not less than the {max_steps} steps of the run: warming up for {warmup}")
        scheduler = cosine_schedule(optimizer, warmup, max_steps, train.min_lr)
        self.loop = loop = Loop(
            fabric,
            model,
            optimizer,
            scheduler,
            train_loader,
            val_loader,
            train,
            options.eval,
            max_steps,
            self.save_step,
            self.show_example if options.eval.max_new_tokens else None,
            self.report,
        )
        if resume is not None:
            fabric.print(f"Resuming training from {resume}")
            self.load(resume)
        if val_loader is not None:
            if options.eval.initial_validation:
                loss = loop.validate()
                fabric.print(f"Initial evaluation | val loss: {loss:.3f}")
            else:
                fabric.print("Verifying settings ...")
                loop.validate(VERIFIED_BATCHES)
        began = time.perf_counter()
        position = loop.run()
        seconds = time.perf_counter() - began
        if val_loader is not None and options.eval.final_validation:
            loss = loop.validate()
            loop.note_validation(loss)
            self.report.final_validation(loop, loss)
        metrics = self._metrics(position, seconds)
        self.report.summary(metrics)
        self.save_final()
        return metrics

    def _metrics(self, position: Position, seconds: float) -> dict[str, float]:
        metrics = {
            "steps": position.step_count,
            "tokens": position.tokens,
            "counted_tokens": position.counted,
            "seconds": position.seconds,
            "tokens_per_second": position.tokens / max(position.seconds, 1e-9),
        }
        if self.report.curve:
            metrics["train_loss"] = self.report.curve[-1][1]
        if self.report.val_loss is not None:
            metrics["val_loss"] = self.report.val_loss
        return metrics

    # -- checkpoints

    def save_step(self, loop: Loop) -> Path | None:
        """Write a checkpoint from which the run can go on; old ones go, as `train.keep_last` says."""
        if self.options.out_dir is None:
            return None
        position = loop.position
        random = [random_state()]
        if self.fabric.world_size > 1:
            random = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(random, random_state())
        state = {
            "optimizer": loop.optimizer.state_dict(),
            "scheduler": loop.scheduler.state_dict(),
            "iter_num": position.iter_num,
            "step_count": position.step_count,
            "loop": loop.state(),
            "random": random,
            "method": self.method.name,
            "model_name": self.gpt.config.name,
        }
        folder = self.options.out_dir / f"step-{position.step_count:06d}"
        self._write(folder, state)
        if self.fabric.is_global_zero:
            remove_old(self.options.out_dir, self.options.train.keep_last, f"step-{position.best_step:06d}")
        return folder

    def save_final(self) -> None:
        """Write the tuned model, the curve of the losses, and say how to talk with it."""
        out_dir = self.options.out_dir
        if out_dir is None:
            return
        self._write(out_dir / "final", {})
        if not self.fabric.is_global_zero:
            return
        if self.method.name == "lora" and self.source is not None:
            from litgpt.scripts.merge_lora import merge_lora

            merge_lora(out_dir / "final")
        (out_dir / "logs").mkdir(exist_ok=True)
        self.report.write_curve(out_dir / "logs" / "loss.svg")
        self.fabric.print(f"The losses as a picture: {out_dir / 'logs' / 'loss.svg'}")
        if self.method.name in ("lora", "full"):
            self.fabric.print(f"Talk with the result: litgpt chat {out_dir / 'final'}")
        else:
            name = f"generate_{self.method.name}"
            self.fabric.print(f"Try the result: litgpt {name} --finetuned_path {out_dir / 'final'} --prompt '...'")

    def _write(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write the trained weights, `state`, and all that belongs to a checkpoint. All processes call it."""
        weights = full_tensors(self.gpt.state_dict().items(), self.method.is_trained)
        if self.fabric.is_global_zero:
            self.fabric.print(f"Saving checkpoint to {str(folder)!r}")
            try:
                with replacing_folder(folder) as temporary:
                    torch.save({"model": weights, **state}, temporary / (WEIGHTS_NAME + self.method.suffix))
                    self._write_side_files(temporary)
            except (OSError, RuntimeError) as error:
                last = step_folders(folder.parent)
                kept = f"; the last complete checkpoint is {last[-1]}" if last else ""
                raise OSError(f"{folder} could not be written: {error}{kept}") from None
        self.fabric.barrier()

    def _write_side_files(self, folder: Path) -> None:
        base = self.gpt.config if self.source is None else self.source.config
        (folder / CONFIG_NAME).write_text(yaml.safe_dump(base.to_dict(), sort_keys=False), encoding="utf-8")
        (folder / "hyperparameters.yaml").write_text(
            yaml.safe_dump(dict(self.hyperparameters), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        if self.source is not None:
            self.source.copy_side_files(folder)
        else:
            self.tokenizer.save(folder)
        style = getattr(self.data, "prompt_style", None)
        if style is not None:
            save_prompt_style(style, folder)

    def load(self, path: Path) -> None:
        """Go on from a step checkpoint.

        Raises:
            ValueError: if it is of another model or method, or not one to go on from.
        """
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if "loop" not in state:
            raise ValueError(f"--resume: {path} holds weights only; give the file of a step-* folder")
        for name, own in (("method", self.method.name), ("model_name", self.gpt.config.name)):
            if state[name] != own:
                raise ValueError(f"--resume: {path} is of {name}={state[name]!r}, this run of {own!r}")
        parameters = self.gpt.state_dict()
        with torch.no_grad():
            for name, value in state["model"].items():
                if name not in parameters or parameters[name].shape != value.shape:
                    raise ValueError(f"--resume: {path} does not fit the model: {name} {tuple(value.shape)}")
                parameters[name].copy_(value)
        self.loop.optimizer.load_state_dict(state["optimizer"])
        self.loop.scheduler.load_state_dict(state["scheduler"])
        random = state["random"]
        own = random[self.fabric.global_rank if len(random) == self.fabric.world_size else 0]
        self.loop.load_state({**state["loop"], "random": own})

    # -- examples

    def show_example(self) -> None:
        """Show what the model says to a validation sample."""
        if any(hasattr(p, "full_tensor") for p in self.gpt.parameters()):
            return  # divided among processes
        dataset = getattr(getattr(self.loop.val_loader, "dataset", None), "examples", None)
        if not dataset:
            return
        which = self.options.eval.evaluate_example
        index = 0 if which == "first" else torch.randint(len(dataset), ()).item() if which == "random" else int(which)
        prompt, ids = dataset[index % len(dataset)]
        from litgpt.generate.base import generate

        before, was_training = random_state(), self.gpt.training
        self.gpt.eval()
        self.fabric.print(prompt)
        ids = ids.to(self.fabric.device)
        room = self.gpt.max_seq_length - len(ids)
        if room > 0:
            new = min(self.options.eval.max_new_tokens, room)
            with torch.no_grad():
                out = generate(
                    self.gpt, ids, len(ids) + new, temperature=0.8, eos_id=self.tokenizer.eos_id, include_prompt=False
                )
            self.fabric.print(f"{self.tokenizer.decode(out)}\n")
        self.gpt.clear_kv_caches()
        self.gpt.train(was_training)
        set_random_state(before)
