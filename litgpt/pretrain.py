"""The command `pretrain`."""

import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from lightning.fabric.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.base import WEIGHTS_NAME
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model, save_config
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config, name_to_config
from litgpt.data import TinyLlama
from litgpt.finetune import base
from litgpt.model import GPT, CausalSelfAttention, GptNeoxMLP, LLaMAMLP
from litgpt.moe import GroupedTopkRouter
from litgpt.tokenizer import Tokenizer
from litgpt.train.finetuning import tie
from litgpt.train.loop import Loop
from litgpt.train.methods import METHODS
from litgpt.train.model import TrainingModel
from litgpt.train.options import PretrainOptions, command, taking
from litgpt.train.run import Run, connect
from litgpt.train.schedule import cosine_schedule, learning_rate_factor, steps_of_run
from litgpt.train.setting import make_fabric, precision_of, weights_dtype
from litgpt.utils import copy_config_files, estimate_flops


def _pretrain(options: PretrainOptions) -> None:
    name = options.model_name
    if name == "list":
        print("\n".join(name_to_config))
        return
    if (config := options.model_config) is None:
        config = open_checkpoint(Path(name)).config if Path(name).is_dir() else Config.from_name(name)
    if options.data is None:
        options.data = TinyLlama()
    options.check()
    options.check_model(config)
    tokenizer = None
    if options.initial_checkpoint_dir is not None:
        options.initial_checkpoint_dir = find_checkpoint(options.initial_checkpoint_dir)
        options.tokenizer_dir = options.tokenizer_dir or options.initial_checkpoint_dir
    if options.tokenizer_dir is not None:
        options.tokenizer_dir = find_checkpoint(options.tokenizer_dir)
        tokenizer = _open_tokenizer(options.tokenizer_dir)
    resume = options.resume_path("")
    fabric = make_fabric(options, f"pretrain-{config.name}", config, resume is not None)
    options.describe(precision_of(fabric), config)
    fabric.launch(_train, config, tokenizer, options, resume)


def _open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder that may hold nothing else, or of a checkpoint."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        with suppress(FileNotFoundError):  # no checkpoint either: `Tokenizer` says what is missing
            return open_checkpoint(path).tokenizer()
    return Tokenizer(path)


_TRAIN = TrainArgs(global_batch_size=512, max_tokens=int(3e12), max_norm=1.0, min_lr=4e-5, lr_warmup_steps=2000)
_DEFAULTS = {"out_dir": Path("out/pretrain"), "train": replace(_TRAIN, tie_embeddings=False), "seed": 42}
_DEFAULTS |= {"eval": EvalArgs(interval=1000), "devices": "auto", "logger_name": "tensorboard"}
setup = command(
    PretrainOptions,
    _pretrain,
    "Train a model from random weights, or continue from a checkpoint's with text.",
    "model_name model_config out_dir precision initial_checkpoint_dir resume data train eval log optimizer devices "
    "num_nodes tokenizer_dir logger_name seed strategy kv_cache cache_length kv_cache_args prompt_chunksize",
    _DEFAULTS,
)


def _train(
    fabric: Fabric, config: Config, tokenizer: Tokenizer | None, options: PretrainOptions, resume_path: Path | None
) -> dict[str, float]:
    """What every process does. Returns metrics: see `Run.run`."""
    fabric.seed_everything(options.seed)
    folder = options.initial_checkpoint_dir
    start = None if folder is None else open_checkpoint(find_checkpoint(folder))
    if start is not None:
        METHODS["full"].check(start.quantization)
    loaders = connect(fabric, options.data, tokenizer, options.train, config)
    began = time.perf_counter()
    if start is None:
        with fabric.init_module(empty_init=False):
            gpt = GPT(config)
        initialize_weights(fabric, gpt, config.n_layer, config.n_embd)
    else:
        start.config = config  # its own may differ in what weights do not depend on
        gpt = load_model(start, weights_dtype(fabric), fabric.device)
    tie(gpt, False, options.train.tie_embeddings)
    fabric.print(f"Time to instantiate model: {time.perf_counter() - began:.02f} seconds.")
    fabric.print(f"Total parameters: {sum(p.numel() for p in gpt.parameters()):,}")
    flops = estimate_flops(gpt, training=True) * options.train.micro_batch_size * fabric.world_size
    fabric.print(f"Measured TFLOPs: {flops / 1e12:.2f}")
    save_tokenizer = None if tokenizer is None else tokenizer.save
    metrics = Run(fabric, gpt, config, METHODS["full"], options, loaders, save_tokenizer).run(resume_path)
    if tokenizer is not None:
        fabric.print(f"Chat with the result: litgpt chat {options.out_dir / 'final'}")
    return metrics


@torch.no_grad()
def initialize_weights(fabric: Any, model: nn.Module, n_layer: int, n_embd: int) -> None:
    """Random weights as GPT-NeoX has them (arXiv:2204.06745): deviation sqrt(2 / (5 n_embd)), and 1 / (sqrt(n_embd) n_layer)
    in the layers that write to the residual stream, so that its size does not grow with the depth."""
    usual, residual = math.sqrt(2.0 / (5.0 * n_embd)), 1.0 / math.sqrt(n_embd) / n_layer
    whole = not isinstance(fabric.strategy, FSDPStrategy)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | GroupedTopkRouter):
            nn.init.normal_(module.weight, std=usual)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif whole and callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for module in model.modules():
        if isinstance(module, CausalSelfAttention | GptNeoxMLP | LLaMAMLP):
            nn.init.normal_(module.proj.weight, std=residual)


def get_lr(learning_rate: float, it: int, warmup_iters: int, max_iters: int, min_lr: float) -> float:
    """The learning rate of iteration `it`: linear warm-up from 0, then a cosine to `min_lr`."""
    if it < warmup_iters:
        return learning_rate * it / warmup_iters
    return learning_rate * learning_rate_factor(it, warmup_iters, max_iters, min_lr / learning_rate)


# -- what scripts that were written for LitGPT import


def _main(fabric: Fabric, config: Config, tokenizer: Tokenizer | None, **given: Any) -> None:
    """Train in a process that `fabric` launched, by options."""
    options = PretrainOptions(model_name=config.name, **given)
    options.check()
    options.describe(precision_of(fabric), config)
    _train(fabric, config, tokenizer, options, options.resume_path(""))


main = taking(
    "fabric devices seed initial_checkpoint_dir resume config data out_dir tokenizer_dir tokenizer train eval optimizer "
    "num_nodes",
    _main,
    {"num_nodes": 1},
)


def fit(
    fabric: Fabric,
    devices: int,
    state: dict[str, Any],
    train_dataloader: DataLoader,
    val_dataloader: DataLoader,
    out_dir: Path,
    tokenizer_dir: Path | None,
    train: TrainArgs,
    eval: EvalArgs,
    num_nodes: int = 1,
) -> None:
    """Train `state["model"]` with `state["optimizer"]`, both set up, on batches of tokens (B, T + 1)."""
    model = base.unwrapped(state["model"])
    steps = steps_of_run(train_dataloader, train, devices * num_nodes, model.max_seq_length)
    schedule = cosine_schedule(state["optimizer"], min(train.lr_warmup_steps or 0, steps // 10), steps, train.min_lr)

    def save(step: int) -> None:
        save_checkpoint(fabric, state, tokenizer_dir, Path(out_dir) / f"step-{step:08d}" / WEIGHTS_NAME)

    training = fabric.setup_module(TrainingModel(model, train.activation_checkpointing))
    parts = (training, state["optimizer"], schedule, train_dataloader, val_dataloader)
    Loop(fabric, *parts, train, eval, steps, save, None).run()


get_dataloaders = base.get_dataloaders  # with a `block_size`


def validate(
    fabric: Fabric, model: nn.Module, val_dataloader: DataLoader, max_iters: int, verbose: bool = True
) -> torch.Tensor:
    """Mean loss of the tokens of at most `max_iters` batches."""
    return base.validate(fabric, model, val_dataloader, EvalArgs(max_iters=max_iters), verbose)


def save_checkpoint(fabric: Fabric, state: dict[str, Any], tokenizer_dir: Path | None, checkpoint_file: Path) -> None:
    """Write a model, its configuration, and the tokenizer's files. All processes call it."""
    base.save_trained("full", fabric, state["model"], checkpoint_file)
    if fabric.is_global_zero:
        save_config(base.unwrapped(state["model"]).config, Path(checkpoint_file).parent)
        if tokenizer_dir is not None:
            copy_config_files(tokenizer_dir, Path(checkpoint_file).parent)


def validate_args(train: TrainArgs, eval: EvalArgs, initial_checkpoint_dir: Path | None, resume: Any) -> None:
    """Raise `ValueError` for what does not go together."""
    PretrainOptions(model_name="", train=train, initial_checkpoint_dir=initial_checkpoint_dir, resume=resume).check()
