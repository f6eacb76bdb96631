"""The command `finetune_lora`."""

from functools import partial
from pathlib import Path
from typing import Literal

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.finetune import base
from litgpt.finetune.base import generate_example as generate_example
from litgpt.finetune.base import get_dataloaders as get_dataloaders
from litgpt.finetune.base import get_longest_seq_length as get_longest_seq_length
from litgpt.finetune.base import get_lr_scheduler as get_lr_scheduler
from litgpt.finetune.base import parallelize_fn as parallelize_fn
from litgpt.finetune.base import validate as validate
from litgpt.finetune.base import validate_args as validate_args
from litgpt.train.finetuning import finetune_command
from litgpt.train.setting import LoggerName, Strategy

main = partial(base.main, "lora")
fit = partial(base.fit, "lora")
save_lora_checkpoint = partial(base.save_trained, "lora")


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    precision: str | None = None,
    quantize: Literal["int8", "int4", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training"]
    | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    lora_all: bool = False,
    lora_rslora: bool = False,
    lora_dora: bool = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(  # noqa: B008
        save_interval=1000,
        log_interval=1,
        global_batch_size=16,
        micro_batch_size=1,
        lr_warmup_steps=100,
        epochs=5,
        max_seq_length=None,
    ),
    log: LogArgs = LogArgs(),  # noqa: B008
    eval: EvalArgs = EvalArgs(interval=100, max_new_tokens=100, max_iters=100),  # noqa: B008
    optimizer: str | dict = "AdamW",
    logger_name: LoggerName = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    strategy: Strategy = "auto",
    resume: bool | Literal["auto"] | Path = False,
) -> None:
    """Fine-tune a model by LoRA: small matrices next to its frozen weights (arXiv:2106.09685).

    Args:
        checkpoint_dir: The model: a folder (Hugging Face or LitGPT), a .gguf file, or a name.
        out_dir: Where checkpoints and logs go.
        precision: 32-true, bf16-true, bf16-mixed or 16-mixed. Default: what is fast on the device.
        quantize: Keep the frozen weights in fewer bits: int8 or int4, or on a GPU one of bitsandbytes' ways.
        devices: How many GPUs, or processes on a CPU.
        num_nodes: How many machines.
        lora_r: Rank of the LoRA matrices.
        lora_alpha: Their product is scaled by lora_alpha / lora_r.
        lora_dropout: Part of their inputs that is left out at random.
        lora_query, lora_key, lora_value, lora_projection, lora_mlp, lora_head: Which layers have them.
        lora_all: All linear layers but the head have them.
        lora_rslora: Scale their product by lora_alpha / sqrt(lora_r) (rsLoRA), which suits large ranks.
        lora_dora: Train the norms of the weights' rows too (DoRA): often better at small ranks, and slower.
        data: The data: `--data JSON --data.json_path FILE`, or another module of `litgpt.data`. Default: Alpaca.
        train: How to train.
        eval: How to validate.
        log: What loggers with an account are told.
        optimizer: A class of `torch.optim` or an import path; `--optimizer.init_args.lr 1e-4` sets its arguments.
        logger_name: csv, tensorboard, wandb or mlflow.
        seed: Of all random numbers.
        access_token: Of the Hugging Face hub, for models that ask for one.
        strategy: How several devices share the work: ddp (each has all weights) or fsdp (each has a part of them).
        resume: Go on from the last checkpoint in `out_dir` (true; or auto: if there is one), or from a file.
    """
    finetune_command("lora", locals())
