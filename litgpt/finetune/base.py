"""The commands that fine-tune, and what LitGPT's scripts of them offer for import, once for all four."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from torch import nn
from torch.utils.data import DataLoader

from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.base import WEIGHTS_NAME
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.open import open_checkpoint
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.model import GPT
from litgpt.prompts import encode_prompt
from litgpt.tokenizer import Tokenizer
from litgpt.train import loop
from litgpt.train.checkpointing import full_tensors
from litgpt.train.finetuning import finetune_command, tune
from litgpt.train.methods import METHODS
from litgpt.train.model import TrainingModel
from litgpt.train.options import FinetuneOptions, LoRAOptions, command, taking
from litgpt.train.run import connect, show_answer
from litgpt.train.schedule import cosine_schedule, steps_of_run
from litgpt.train.setting import divide_parameters, precision_of
from litgpt.utils import copy_config_files, select_sft_generate_example

__all__ = [
    "generate_example",
    "get_dataloaders",
    "get_longest_seq_length",
    "get_lr_scheduler",
    "parallelize_fn",
    "validate",
    "validate_args",
]

get_lr_scheduler = cosine_schedule  # by default to 0

_SUMMARIES = {
    "full": "Fine-tune all weights of a model.",
    "lora": "Fine-tune a model by LoRA: small matrices next to its frozen weights (arXiv:2106.09685).",
    "adapter": "Fine-tune a model by LLaMA-Adapter: learned prefixes in its upper layers (arXiv:2303.16199).",
    "adapter_v2": "Fine-tune a model by LLaMA-Adapter V2: prefixes, and scales and biases of all layers (arXiv:2304.15010).",
}
_BEGIN = "checkpoint_dir out_dir precision"
_END = "optimizer logger_name seed access_token strategy kv_cache cache_length kv_cache_args prompt_chunksize"
_LORA = " ".join(f.name for f in fields(LoRAOptions) if f.name.startswith("lora_"))
_NAMES = {
    "full": f"{_BEGIN} devices num_nodes resume data train eval log {_END}",
    "lora": f"{_BEGIN} quantize devices num_nodes {_LORA} data train log eval {_END} resume",
    "adapter": f"{_BEGIN} quantize devices num_nodes data train eval log {_END} resume",
    "adapter_v2": f"{_BEGIN} quantize devices num_nodes resume data train eval log {_END}",
}


_MAIN = "fabric devices seed config data checkpoint_dir out_dir train eval optimizer num_nodes precision"
_PARTS = "model optimizer scheduler"
_FIT = f"fabric {_PARTS} train_dataloader val_dataloader devices checkpoint_dir out_dir train eval data num_nodes"
_MAINS = {"full": _MAIN.replace("seed", "resume seed"), "adapter_v2": _MAIN.replace("data", "data resume")}
_FITS = {"full": _FIT.replace(_PARTS, "state"), "adapter_v2": _FIT}
_FITS = {method: names.replace("devices", "devices resume") for method, names in _FITS.items()}


def functions_of(method: str) -> tuple[Callable[..., Any], ...]:
    """What the script of a method offers: `setup`, `main`, `fit`, and how it saves."""
    defaults: dict[str, Any] = {"out_dir": Path("out/finetune") / method.replace("_", "-")}
    if method == "full":
        defaults["eval"] = EvalArgs(interval=600, max_new_tokens=100)
    kind = LoRAOptions if method == "lora" else FinetuneOptions
    setup = command(kind, partial(finetune_command, method), _SUMMARIES[method], _NAMES[method], defaults)
    rest = {"num_nodes": 1, "precision": None}
    by_names = ((_MAINS.get(method, _MAIN), main), (_FITS.get(method, _FIT), fit))
    return setup, *(taking(names, partial(f, method), rest) for names, f in by_names), partial(save_trained, method)


def main(method: str, fabric: Fabric, config: Config, **given: Any) -> None:
    """Fine-tune in a process that `fabric` launched, by options; `config` has the fields of the method."""
    options = FinetuneOptions(**given)
    options.check()
    options.describe(precision_of(fabric), config)
    way, checkpoint = METHODS[method], open_checkpoint(find_checkpoint(options.checkpoint_dir))
    tune(fabric, way, checkpoint, config, options, options.resume_path(way.suffix))


def fit(
    method: str,
    fabric: Fabric,
    train_dataloader: DataLoader,
    val_dataloader: DataLoader | None,
    devices: int,
    checkpoint_dir: Path,
    out_dir: Path,
    train: TrainArgs,
    eval: EvalArgs,
    data: DataModule,
    num_nodes: int,
    resume: Any = None,
    **parts: Any,
) -> dict[str, torch.Tensor]:
    """Train a model that is set up, with checkpoints of what the method trains. Returns counts of tokens by LitGPT's names.

    Args:
        resume: not used: `setup` resumes runs.
        parts: `model`, `optimizer` and `scheduler`, or a mapping `state` of them.
    """
    model, optimizer, scheduler = map(parts.get("state", parts).get, _PARTS.split())
    gpt, way = unwrapped(model), METHODS[method]

    def save(step: int) -> None:
        folder = Path(out_dir) / f"step-{step:06d}"
        save_trained(method, fabric, gpt, folder / f"{WEIGHTS_NAME}{way.suffix}")
        if fabric.is_global_zero:
            copy_config_files(checkpoint_dir, folder)

    steps = steps_of_run(train_dataloader, train, devices * num_nodes, gpt.max_seq_length)
    show = (lambda: generate_example(fabric, gpt, data.tokenizer, eval, data)) if eval.max_new_tokens else None
    training = fabric.setup_module(TrainingModel(gpt, train.activation_checkpointing))
    loaders = (train_dataloader, val_dataloader)
    position = loop.Loop(fabric, training, optimizer, scheduler, *loaders, train, eval, steps, save, show).run()
    counted, tokens = (torch.tensor([n], device=fabric.device) for n in (position.counted, position.tokens))
    names = ("raw_tokens_plus_prompt_template", "raw_tokens_plus_prompt_template_and_padding")
    return {"raw_tokens": counted, **dict.fromkeys(names, tokens)}


def unwrapped(model: nn.Module) -> GPT:
    """The GPT in what `fabric.setup` gives."""
    while not isinstance(model, GPT):
        model = model.module
    return model


def save_trained(method: str, fabric: Fabric, model: nn.Module, file_path: Path) -> None:
    """Write what a method trains. All processes call it."""
    fabric.print(METHODS[method].saving(Path(file_path)))
    weights = full_tensors(unwrapped(model), METHODS[method].is_trained)
    if fabric.is_global_zero:
        Path(file_path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": weights}, file_path)
    fabric.barrier()


def validate(
    fabric: Fabric, model: nn.Module, val_dataloader: DataLoader, eval: EvalArgs, verbose: bool = True
) -> torch.Tensor:
    """Mean loss of the counted tokens of at most `eval.max_iters` batches."""
    if verbose:
        fabric.print("Validating ...")
    return torch.tensor(loop.validate(fabric, TrainingModel(unwrapped(model)), val_dataloader, eval.max_iters))


def generate_example(fabric: Fabric, model: nn.Module, tokenizer: Tokenizer, eval: EvalArgs, data: DataModule) -> None:
    """Print the instruction of a sample, and what the model says to it."""
    gpt, instruction = unwrapped(model), select_sft_generate_example(eval, data)
    ids = encode_prompt(tokenizer, data.prompt_style, instruction)
    show_answer(fabric, gpt, tokenizer, instruction, ids, eval.max_new_tokens or 0)


def get_dataloaders(
    fabric: Fabric, data: DataModule, tokenizer: Tokenizer | None, train: TrainArgs, block_size: int | None = None
) -> tuple[DataLoader, DataLoader]:
    """Loaders of training and validation batches; `fit` moves batches to their device."""
    return connect(fabric, data, tokenizer, train, Config(block_size=block_size or train.max_seq_length or 2**31 - 1))


def get_longest_seq_length(data: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Tokens of the longest sample, and its index."""
    lengths = [len(sample["input_ids"]) for sample in data]
    longest = max(lengths)
    return longest, lengths.index(longest)


def parallelize_fn(model: nn.Module, device_mesh: Any, activation_checkpointing: bool = True) -> nn.Module:
    """Divide a model's parameters among the processes of `device_mesh`, for Lightning's `ModelParallelStrategy`."""
    if activation_checkpointing:
        TrainingModel(unwrapped(model), activation_checkpointing=True)
    return divide_parameters(model, device_mesh)


def validate_args(train: TrainArgs, eval: EvalArgs) -> None:
    """Raise `ValueError` for what does not go together."""
    FinetuneOptions(checkpoint_dir=Path(), train=train, eval=eval).check()
