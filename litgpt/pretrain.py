"""The command `pretrain`."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Fabric
from torch import nn

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config, name_to_config
from litgpt.data import DataModule
from litgpt.model import GPT, CausalSelfAttention
from litgpt.moe import GroupedTopkRouter
from litgpt.tokenizer import Tokenizer
from litgpt.train.finetuning import tie
from litgpt.train.methods import METHODS
from litgpt.train.run import Options, Run, connect, write_config
from litgpt.train.setting import LoggerName, Strategy, compute_dtype, plain, precision_of


def setup(
    model_name: str,
    model_config: Config | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: Literal["bf16-true", "bf16-mixed", "32-true", "16-mixed"] | None = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(  # noqa: B008
        save_interval=1000,
        log_interval=1,
        global_batch_size=512,
        micro_batch_size=4,
        max_tokens=int(3e12),
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=2000,
        tie_embeddings=False,
    ),
    eval: EvalArgs = EvalArgs(interval=1000, max_iters=100),  # noqa: B008
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    num_nodes: int = 1,
    tokenizer_dir: Path | None = None,
    logger_name: LoggerName = "tensorboard",
    seed: int = 42,
    strategy: Strategy = "auto",
) -> None:
    """Train a model from random weights, or go on from a checkpoint's with text.

    Args:
        model_name: The architecture: the name of a model, or a folder with a `model_config.yaml`. `list` shows the names.
        model_config: The architecture, field by field, in place of that of `model_name`.
        out_dir: Where checkpoints and logs go.
        precision: 32-true, bf16-true, bf16-mixed or 16-mixed. Default: what is fast on the device.
        initial_checkpoint_dir: Begin with the weights of this checkpoint instead of random ones.
        resume: Go on from the last checkpoint in `out_dir` (true; or auto: if there is one), or from a file.
        data: The data: `--data TextFiles --data.train_data_path FOLDER`, or another module of `litgpt.data`. Default:
            TinyLlama.
        train: How to train.
        eval: How to validate.
        log: What loggers with an account are told.
        optimizer: A class of `torch.optim` or an import path; `--optimizer.init_args.lr 1e-4` sets its arguments.
        devices: How many GPUs, or processes on a CPU.
        num_nodes: How many machines.
        tokenizer_dir: Folder of the tokenizer, for data that is text; its files go into every checkpoint.
        logger_name: csv, tensorboard, wandb or mlflow.
        seed: Of all random numbers.
        strategy: How several devices share the work: ddp (each has all weights) or fsdp (each has a part of them).
    """
    arguments = dict(locals())
    if model_name == "list":
        print("\n".join(name_to_config))
        return
    config = model_config or _config(model_name)
    if initial_checkpoint_dir is not None and resume:
        raise ValueError("initial_checkpoint_dir begins anew, resume goes on: give one of the two")
    if data is None:
        from litgpt.data import TinyLlama

        data = TinyLlama()
    own = ("out_dir", "precision", "devices", "num_nodes", "strategy", "resume", "train", "eval", "log", "optimizer")
    options = Options(
        **{name: arguments[name] for name in (*own, "logger_name", "seed")},
        step_digits=8,
    )
    options.check()
    tokenizer = None if tokenizer_dir is None else Tokenizer(tokenizer_dir)
    start = None
    if initial_checkpoint_dir is not None:
        start = open_checkpoint(find_checkpoint(initial_checkpoint_dir))
    resume_path = options.resume_path("")
    fabric = options.fabric(f"pretrain-{config.name}", config, resume_path is not None)
    chosen = precision_of(fabric)
    options.hyperparameters = {
        name: plain(value) for name, value in (arguments | {"precision": chosen}).items() if value is not None
    }

    def write_side_files(folder: Path) -> None:
        write_config(config, folder)
        if tokenizer is not None:
            tokenizer.save(folder)

    def main(fabric: Fabric) -> dict[str, float]:
        fabric.seed_everything(seed)
        loaders = connect(fabric, data, tokenizer, train, config)
        if start is None:
            with fabric.init_module(empty_init=False):
                gpt = GPT(config)
            initialize_weights(fabric, gpt, config.n_layer, config.n_embd)
        else:
            gpt = load_model(start, compute_dtype(chosen), fabric.device)
        tie(gpt, False, train.tie_embeddings)
        fabric.print(f"Total parameters: {sum(p.numel() for p in gpt.parameters()):,}")
        return Run(fabric, gpt, METHODS["full"], data, loaders, options, write_side_files).run(resume_path)

    fabric.launch(main)


def _config(model_name: str) -> Config:
    """The architecture of a name, or of a folder."""
    if Path(model_name).is_dir():
        return open_checkpoint(Path(model_name)).config
    return Config.from_name(model_name)


@torch.no_grad()
def initialize_weights(fabric: Any, model: GPT, n_layer: int, n_embd: int) -> None:
    """Random weights as GPT-NeoX has them (arXiv:2204.06745): deviation sqrt(2 / (5 n_embd)), and 1 / (sqrt(n_embd) n_layer)
    in the layers that write to the residual stream, so that its size does not grow with the depth."""
    usual, residual = math.sqrt(2.0 / (5.0 * n_embd)), 1.0 / math.sqrt(n_embd) / n_layer
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=usual)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GroupedTopkRouter):
            nn.init.normal_(module.weight, std=usual)
    for block in model.transformer.h:
        if isinstance(block.attn, CausalSelfAttention):
            nn.init.normal_(block.attn.proj.weight, std=residual)
        for name, module in block.mlp.named_modules():
            if name.rpartition(".")[2] == "proj" and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual)


def get_lr(learning_rate: float, it: int, warmup_iters: int, max_iters: int, min_lr: float) -> float:
    """The learning rate of iteration `it`: linear warm-up from 0, then a cosine to `min_lr`."""
    if it < warmup_iters:
        return learning_rate * it / warmup_iters
    if it > max_iters:
        return min_lr
    progress = (it - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
