"""Fine-tuning: from a checkpoint or a loaded model to a tuned one."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Fabric

from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model, save_litgpt
from litgpt.checkpoint.open import open_checkpoint, open_lora
from litgpt.config import Config
from litgpt.data import JSON, DataModule
from litgpt.data.memory import Samples
from litgpt.lora import merge_lora_weights, unwrap_lora
from litgpt.model import GPT
from litgpt.train.methods import METHODS, Method
from litgpt.train.run import Options, Run, connect, write_config
from litgpt.train.setting import compute_dtype, plain, precision_of

if TYPE_CHECKING:
    from litgpt.api import LLM


def finetune_command(method: str, arguments: Mapping[str, Any]) -> dict[str, float]:
    """What the commands `finetune_*` do.

    Args:
        method: full, lora, adapter or adapter_v2.
        arguments: of the command's `setup`, by name.

    Returns:
        The run's metrics: see `Run.run`.
    """
    way, arguments = METHODS[method], dict(arguments)
    data = arguments.pop("data") or _alpaca()
    access_token, quantize = arguments.pop("access_token"), arguments.get("quantize")
    options = Options(**{f.name: arguments[f.name] for f in fields(Options) if f.name in arguments})
    options.check()
    if quantize is not None and way.trains_all:
        raise ValueError(f"quantize={quantize!r}: full fine-tuning needs plain weights; use finetune_lora")
    checkpoint = open_checkpoint(find_checkpoint(arguments["checkpoint_dir"], access_token))
    if checkpoint.quantization is not None and way.trains_all:
        raise ValueError(f"{checkpoint.path} is quantised: full fine-tuning needs plain weights; use finetune_lora")
    resume = options.resume_path(way.suffix)
    fabric = options.fabric(f"finetune-{checkpoint.config.name}", checkpoint.config, resume is not None)
    precision = precision_of(fabric)
    options.hyperparameters = {
        name: plain(value)
        for name, value in (arguments | {"precision": precision, "data": data}).items()
        if value is not None
    }

    def write_side_files(folder: Path) -> None:
        write_config(checkpoint.config, folder)
        checkpoint.copy_side_files(folder)

    def main(fabric: Fabric) -> dict[str, float]:
        fabric.seed_everything(options.seed)
        tokenizer = checkpoint.tokenizer()
        loaders = connect(fabric, data, tokenizer, options.train, checkpoint.config)
        gpt = load_model(checkpoint, compute_dtype(precision), fabric.device, quantize=quantize)
        tie(gpt, checkpoint.tied, options.train.tie_embeddings)
        settings = {name: value for name, value in arguments.items() if name.startswith(f"{method}_")}
        way.prepare(gpt, extended_config(gpt.config, way, settings))
        metrics = Run(fabric, gpt, way, data, loaders, options, write_side_files, tokenizer).run(resume)
        if fabric.is_global_zero and options.out_dir is not None:
            final = options.out_dir / "final"
            if method == "lora":
                save_litgpt(open_lora(final), final)
            if method in ("lora", "full"):
                fabric.print(f"Talk with the result: litgpt chat {final}")
            else:
                fabric.print(f"Try the result: litgpt generate_{method} --adapter_path {final} --prompt '...'")
        return metrics

    return fabric.launch(main)


def finetune(
    llm: "LLM",
    data: DataModule | Sequence[Mapping[str, Any]] | str | Path,
    method: str = "lora",
    *,
    out_dir: str | Path | None = None,
    **options: Any,
) -> dict[str, float]:
    """Fine-tune a loaded `LLM`, and leave it tuned.

    Args:
        llm: loaded, with plain weights.
        data: samples (mappings with `instruction` and `output`, or with `messages`), the path of a JSON or JSONL file, or a
            data module.
        method: full, lora, adapter or adapter_v2. LoRA's products are added to the weights in the end.
        out_dir: where checkpoints and logs go (None: nothing is written).
        options: fields of `Options`; of its groups `train` and `eval`, as `max_steps=100`; `learning_rate`; and those of the
            method, such as `lora_r=16` or `lora_mlp=True`.

    Returns:
        Metrics: `steps`, `tokens`, `counted_tokens`, `seconds`, `tokens_per_second`, and, where there are any, the last
        `train_loss` and `val_loss`.

    Raises:
        ValueError: for options that are not known, or do not go together.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    way = METHODS[method]
    chosen, settings = _options(method, out_dir, options)
    chosen.check()
    resume = chosen.resume_path(way.suffix)
    if isinstance(data, str | Path):
        data = JSON(Path(data))
    elif not isinstance(data, DataModule):
        data = Samples(data)
    gpt, tokenizer = llm.prepare_for_training(), llm.tokenizer
    if gpt.quantization is not None and way.trains_all:
        raise ValueError("full fine-tuning needs plain weights: load the model without quantize, or use lora")
    fabric = chosen.fabric(f"finetune-{gpt.config.name}", gpt.config, resume is not None)
    fabric.launch()
    fabric.seed_everything(chosen.seed)
    base = gpt.config
    loaders = connect(fabric, data, tokenizer, chosen.train, base)
    way.prepare(gpt, extended_config(base, way, settings))

    def write_side_files(folder: Path) -> None:
        write_config(base, folder)
        tokenizer.save(folder)

    try:
        metrics = Run(fabric, gpt, way, data, loaders, chosen, write_side_files, tokenizer).run(resume)
    finally:
        if method == "lora":
            merge_lora_weights(gpt)
            unwrap_lora(gpt)
            gpt.config = base
        gpt.requires_grad_(True).eval()
    return metrics


def _options(method: str, out_dir: str | Path | None, options: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """`Options`, and those of the method, from keywords."""
    chosen = Options(out_dir=out_dir)
    settings: dict[str, Any] = {}
    if method == "lora":
        settings = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_query": True, "lora_value": True}
    own = {f.name for f in fields(METHODS[method].config)} - {f.name for f in fields(Config)}
    groups = [chosen, chosen.train, chosen.eval]
    for name, value in options.items():
        if name == "learning_rate":
            chosen.optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": value}}
        elif name in own:
            settings[name] = value
        else:
            group = next((group for group in groups if name in {f.name for f in fields(group)}), None)
            if group is None:
                raise ValueError(f"option {name!r} is not known to fine-tuning by {method}")
            setattr(group, name, value)
    chosen.train.__post_init__()
    chosen.hyperparameters = {name: plain(value) for name, value in {**settings, **options}.items()}
    return chosen, settings


def extended_config(config: Config, method: Method, settings: Mapping[str, Any]) -> Config:
    """The configuration of a model with what `method` adds."""
    return method.config(**{f.name: getattr(config, f.name) for f in fields(config) if f.init}, **settings)


def tie(gpt: GPT, tied: bool, wanted: bool | None) -> None:
    """Have embedding and head share their weight: as `wanted`, or (None) as the checkpoint has them."""
    shared = gpt.lm_head.weight is gpt.transformer.wte.weight
    if (tied if wanted is None else wanted) and not shared:
        gpt.lm_head.weight = gpt.transformer.wte.weight
    elif wanted is False and shared:
        gpt.lm_head.weight = torch.nn.Parameter(gpt.transformer.wte.weight.detach().clone())


def _alpaca() -> DataModule:
    from litgpt.data import Alpaca

    return Alpaca()
