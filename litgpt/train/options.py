"""The options of the training commands and of `litgpt.train.finetune`, each declared once."""

import inspect
import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.atomic_file import check_folder
from litgpt.checkpoint.base import WEIGHTS_NAME
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.errors import UsageError
from litgpt.kvcache import CacheSpec
from litgpt.train.cached_layers import check_trainable
from litgpt.train.checkpointing import step_folders
from litgpt.train.keep_loss import check_keeps_by_attention
from litgpt.train.optimizers import resolve_optimizer
from litgpt.train.setting import LoggerName, Strategy, parse_devices, plain

Quantization = Literal["int8", "int4", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training"]
FINETUNING = TrainArgs(global_batch_size=16, micro_batch_size=1, epochs=5)


def option(default: Any, help: str) -> Any:
    """A field that is an option, with its default value (`MISSING`: it has to be given) and its help."""
    if type(default).__hash__ is None:  # an instance of `TrainArgs` or the like
        return field(default_factory=lambda: copy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class Options:
    """Options of all training runs."""

    step_digits = 6  # of the step number in the names of checkpoints

    out_dir: Path = option(None, "Where checkpoints and logs go.")  # None, from Python only: nowhere
    precision: str | None = option(None, "32-true, bf16-true, bf16-mixed or 16-mixed. Default: what is fast here.")
    devices: int | str = option(1, "How many GPUs, or processes on a CPU.")
    num_nodes: int = option(1, "How many machines.")
    strategy: Strategy = option("auto", "With several devices, ddp: each has all weights, or fsdp: each has a part.")
    resume: bool | Literal["auto"] | Path = option(
        False, "Resume from the last checkpoint in `out_dir` (true; or auto: if there is one), or from a file."
    )
    data: DataModule | None = option(
        None,
        "The data: `--data JSON --data.json_path FILE` (fine-tuning), `--data TextFiles --data.train_data_path FOLDER` "
        "(pretraining), or another module of `litgpt.data`. Default: Alpaca, or TinyLlama.",
    )
    train: TrainArgs = option(FINETUNING, "How to train.")
    eval: EvalArgs = option(EvalArgs(interval=100, max_new_tokens=100), "How to validate.")
    log: LogArgs = option(LogArgs(), "Settings of loggers that need an account.")
    optimizer: str | dict = option("AdamW", "A class of `torch.optim` or an import path; with `--optimizer.lr 1e-4`.")
    logger_name: LoggerName = option("csv", "csv, tensorboard (csv where it is not installed), wandb or mlflow.")
    seed: int = option(1337, "Seed of all random numbers.")
    kv_cache: str | None = option(
        None,
        "Train through this key-value cache, POLICY or POLICY-STORAGE as for `litgpt generate`: tokens see what it keeps.",
    )
    cache_length: int | None = option(None, "Tokens that it holds. Default: as in `litgpt generate`.")
    kv_cache_args: dict[str, Any] | None = option(None, "Its further arguments, such as --kv_cache_args.n_sink 4.")
    prompt_chunksize: int = option(512, "Tokens of a sequence that enter it together.")
    hyperparameters: dict[str, Any] = field(default_factory=dict)  # of the command that repeats the run

    def __post_init__(self) -> None:
        if self.out_dir is not None:
            self.out_dir = Path(os.getenv("LIGHTNING_ARTIFACTS_DIR", "")) / self.out_dir

    @property
    def processes(self) -> int:
        """How many there are on all machines."""
        return parse_devices(self.devices) * self.num_nodes

    @property
    def divides_weights(self) -> bool:
        """Whether each process has a part of every weight."""
        return self.strategy == "fsdp" and self.processes > 1

    def check(self) -> None:
        """Refuse what cannot work before anything is read, fetched or written."""
        train, spec = self.train, self.cache_spec()
        if train.epochs is None and train.max_steps is None and train.max_tokens is None:
            raise ValueError("nothing says how long to train: give train.epochs, train.max_steps or train.max_tokens")
        for name in ("num_nodes", "prompt_chunksize"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        train.gradient_accumulation_iters(self.processes)
        resolve_optimizer(self.optimizer)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in 0..{2**32 - 1}, got {self.seed}")
        if spec is not None:
            self._check_cache(spec)
        elif unused := [
            name for name in ("teacher", "keep_inputs", "keep_loss") if getattr(train, name) not in (None, "device", 0)
        ]:
            raise ValueError(f"--train.{unused[0]} is for training through a key-value cache: name it with --kv_cache")

    def check_model(self, config: Config) -> None:
        """Refuse a cache that a model cannot have, before its weights are read."""
        if (spec := self.cache_spec()) is not None:
            try:
                spec.create(config, 1, torch.device("meta"))
            except ValueError as error:
                raise UsageError(f"--kv_cache: {error}") from None

    def _check_cache(self, spec: CacheSpec) -> None:
        try:
            check_trainable(spec)
            if self.train.keep_loss:
                check_keeps_by_attention(spec)
            if spec.cache_length is not None:
                spec.make_policy(spec.cache_length)
        except ValueError as error:
            raise UsageError(f"--kv_cache: {error}") from None
        teacher, kept = self.train.teacher, self.train.keep_inputs
        if self.divides_weights and teacher is not None:
            raise ValueError("--train.teacher copies weights that fsdp divides among devices: use --strategy ddp")
        if self.divides_weights and self.train.keep_loss:
            raise ValueError(
                "--train.keep_loss is for whole layers, which fsdp divides among devices: use --strategy ddp"
            )
        if self.divides_weights and kept not in (1, "device", "cpu", "disk"):
            raise ValueError(f"--train.keep_inputs {kept}: with --strategy fsdp it must be device, cpu or disk")

    def cache_spec(self) -> CacheSpec | None:
        """The cache to train through, if any; `ValueError` if it does not exist, or there are arguments for it and no cache."""
        if self.kv_cache is not None:
            return CacheSpec.parse(self.kv_cache, self.cache_length, **(self.kv_cache_args or {}))
        if self.cache_length is not None or self.kv_cache_args:
            raise ValueError("--cache_length and --kv_cache_args are of a cache: name it with --kv_cache")
        return None

    def resume_path(self, suffix: str) -> Path | None:
        """The file that the run resumes from (None: it starts from the beginning), of a method with this suffix.

        `FileNotFoundError` if there is no checkpoint to resume from; `ValueError` if the run does not resume and `out_dir` holds
        another one, which must not be overwritten.
        """
        out_dir, resume, name = self.out_dir, self.resume, WEIGHTS_NAME + suffix
        if out_dir is None:
            if resume:
                raise ValueError("resume is for runs that write checkpoints: give out_dir")
            return None
        check_folder(out_dir)
        if resume and resume not in (True, "auto"):
            path = Path(resume) / name if Path(resume).is_dir() else Path(resume)
            if not path.is_file():
                raise FileNotFoundError(f"--resume: {path} does not exist")
            return path
        steps = step_folders(out_dir)
        of_method = [folder / name for folder in steps if (folder / name).is_file()]
        if resume and of_method:
            return of_method[-1]
        if resume is True:
            raise FileNotFoundError(f"--resume: {out_dir} holds no checkpoint (step-*/{name}) to resume from")
        if found := [*steps, *out_dir.glob("final")]:
            known = " of a run already: give another --out_dir, or --resume auto to continue it"
            if resume:
                known = ", and no checkpoint of this method to resume from: give another --out_dir"
            raise ValueError(f"{out_dir} holds {found[-1].name}{known}")
        return None

    def describe(self, precision: str, config: Config, **changed: Any) -> None:
        """Set `hyperparameters`: these options, those of LoRA as `config` has them, and some `changed` (None: left out)."""
        hidden = {"hyperparameters", "lora_all", "lora_rslora", "lora_dora"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        lora = config.lora_options() if hasattr(config, "lora_options") else {}
        if (spec := self.cache_spec()) is not None:
            cache = {"kv_cache": str(spec), "cache_length": spec.cache_length}
            values |= cache | {"kv_cache_args": dict(spec.arguments) or None}
        values |= {"precision": precision, **lora, **changed}
        self.hyperparameters = plain({name: value for name, value in values.items() if value is not None})


@dataclass(kw_only=True)
class FinetuneOptions(Options):
    """Options of the commands that fine-tune."""

    checkpoint_dir: Path = option(MISSING, "The model: a folder (Hugging Face or LitGPT), a .gguf file, or a name.")
    quantize: Quantization | None = option(None, "Keep frozen weights in fewer bits: int8, int4, on a GPU also bnb.*.")
    access_token: str | None = option(None, "Of the Hugging Face hub, for models that ask for one.")


@dataclass(kw_only=True)
class LoRAOptions(FinetuneOptions):
    """Options of fine-tuning by LoRA."""

    lora_r: int = option(8, "Rank of the LoRA matrices.")
    lora_alpha: int = option(16, "Their product is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Part of their inputs that is left out at random.")
    lora_query: bool = option(True, "Queries have them.")
    lora_key: bool = option(False, "Keys have them.")
    lora_value: bool = option(True, "Values have them.")
    lora_projection: bool = option(False, "The output projections of attention have them.")
    lora_mlp: bool = option(False, "All linear layers of MLPs have them.")
    lora_head: bool = option(False, "The head has them.")
    lora_all: bool = option(False, "All linear layers but the head have them.")
    lora_rslora: bool = option(False, "Scale their product by lora_alpha / sqrt(lora_r) (rsLoRA): for large ranks.")
    lora_dora: bool = option(False, "Train the norms of the weights' rows too (DoRA): for small ranks, and slower.")


@dataclass(kw_only=True)
class PretrainOptions(Options):
    """Options of pretraining."""

    step_digits = 8

    model_name: str = option(MISSING, "A model's name, or a folder with `model_config.yaml`; `list` shows the names.")
    model_config: Config | None = option(None, "The architecture, field by field, in place of that of `model_name`.")
    initial_checkpoint_dir: Path | None = option(None, "Begin with this checkpoint's weights instead of random ones.")
    tokenizer_dir: Path | None = option(
        None, "Folder of the tokenizer, for text; saved with each checkpoint. Default: `initial_checkpoint_dir`."
    )

    def check(self) -> None:
        if self.initial_checkpoint_dir is not None and self.resume:
            raise ValueError("initial_checkpoint_dir starts a new run, resume continues one: give one of the two")
        super().check()


def taking(
    names: str, function: Callable[..., Any], defaults: Mapping[str, Any], types: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """`function`, which takes its arguments by name, as a function that has the parameters `names` in this order."""
    types, kind, empty = types or {}, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(name, kind, default=defaults.get(name, empty), annotation=types.get(name, empty))
        for name in names.split()
    ]
    signature = inspect.Signature(parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        return function(**arguments.arguments)

    call.__signature__ = signature
    return call


def command(
    kind: type[Options], run: Callable[[Any], Any], summary: str, names: str, defaults: Mapping[str, Any]
) -> Callable[..., None]:
    """The function `setup` of a command: it makes a `kind` of its arguments, and calls `run` with it.

    Args:
        summary: the first line of its docstring.
        names: its parameters, in this order, which is that of LitGPT's function; those that LitGPT lacks follow.
        defaults: those default values that are not the class's.
    """
    options = {item.name: item for item in fields(kind)}
    own = {name: item.default for name, item in options.items() if item.default is not MISSING}
    own |= {name: item.default_factory() for name, item in options.items() if item.default_factory is not MISSING}
    types = {name: item.type for name, item in options.items()}
    setup = taking(names, lambda **arguments: run(kind(**arguments)), own | dict(defaults), types)
    explained = "\n".join(f"    {name}: {options[name].metadata['help']}" for name in names.split())
    setup.__doc__ = f"{summary}\n\nArgs:\n{explained}\n"
    setup.__name__ = setup.__qualname__ = "setup"
    return setup
