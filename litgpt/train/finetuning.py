"""Fine-tuning: from a checkpoint or a loaded model to a tuned one."""

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Fabric

from litgpt.checkpoint.base import QUANTIZED_NAME, Checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model, save_litgpt
from litgpt.checkpoint.open import open_checkpoint, open_lora
from litgpt.config import Config
from litgpt.data import JSON, DataModule
from litgpt.data.memory import Samples
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import finish_lora, merge_lora_weights, unwrap_lora
from litgpt.model import GPT
from litgpt.train.methods import METHODS, Method
from litgpt.train.model import restore_forward
from litgpt.train.run import Options, Run, connect, write_config
from litgpt.train.setting import compute_dtype, plain, precision_of

if TYPE_CHECKING:
    from litgpt.api import LLM

LORA_DEFAULTS = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_query": True, "lora_value": True}
SAMPLES_NAME = "samples.json"


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
    config = way.config.extending(checkpoint.config, **_settings(method, arguments))
    arguments |= {"precision": precision, "data": data} | _lora_options(config)
    options.hyperparameters = described(arguments)

    return fabric.launch(tune, way, checkpoint, config, data, options, resume, quantize)


def tune(
    fabric: Fabric,
    way: Method,
    checkpoint: Checkpoint,
    config: Config,
    data: DataModule,
    options: Options,
    resume: Path | None,
    quantize: str | None = None,
) -> dict[str, float]:
    """Fine-tune a checkpoint's model in the processes of `fabric`: see `finetune_command`. `config` has what `way` adds."""

    def write_side_files(folder: Path) -> None:
        write_config(checkpoint.config, folder)
        checkpoint.copy_side_files(folder)

    fabric.seed_everything(options.seed)
    tokenizer = checkpoint.tokenizer()
    loaders = connect(fabric, data, tokenizer, options.train, checkpoint.config)
    gpt = load_model(checkpoint, compute_dtype(precision_of(fabric)), fabric.device, quantize=quantize)
    tie(gpt, checkpoint.tied, options.train.tie_embeddings)
    way.prepare(gpt, config)
    metrics = Run(fabric, gpt, way, data, loaders, options, write_side_files, tokenizer).run(resume)
    if fabric.is_global_zero and options.out_dir is not None:
        final = options.out_dir / "final"
        if way.name == "lora":
            del gpt
            gc.collect()  # the run's objects refer to one another; their memory goes to the merged weights
            save_litgpt(open_lora(final), final)
        if way.name in ("lora", "full"):
            fabric.print(f"Talk with the result: litgpt chat {final}")
        else:
            fabric.print(f"Try the result: litgpt generate_{way.name} --adapter_path {final} --prompt '...'")
    return metrics


def finetune(
    llm: "LLM",
    data: DataModule | Sequence[Mapping[str, Any]] | str | Path,
    method: str = "lora",
    *,
    out_dir: str | Path | None = None,
    **options: Any,
) -> dict[str, float]:
    """Fine-tune a loaded `LLM`, and leave it tuned, ready to generate. A run that is interrupted leaves it as far as it came.

    LoRA's matrices are merged into the weights in the end; next to quantised weights they stay, as adapters do.

    Args:
        llm: loaded; with quantised weights for all methods but full.
        data: samples (mappings with `instruction` and `output`, or with `messages`), the path of a JSON or JSONL file, or a
            data module. Samples and files are written down in the `llm`'s own prompt style, and only responses are learned;
            the style of a data module becomes the `llm`'s.
        method: full, lora, adapter or adapter_v2.
        out_dir: where checkpoints and logs go (None: nothing is written). `hyperparameters.yaml` there repeats the run with
            `--config`, if the `llm` came from disk.
        options: fields of `Options`; of its groups `train` and `eval`, as `max_steps=100`; `learning_rate`; of samples and
            files `val_split_fraction` and `mask_prompt`; and those of the method, such as `lora_r=16` or `lora_all=True`.

    Returns:
        Metrics: `steps`, `tokens`, `counted_tokens`, `seconds`, `tokens_per_second`, and, where there are any, the last
        `train_loss` and `val_loss`.

    Raises:
        ValueError: for options that are not known, or do not go together.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    way, tokenizer, base = METHODS[method], llm.tokenizer, llm.model.config
    if type(base) is not Config:
        raise ValueError("the model carries what an earlier fine-tuning added to it: load it anew")
    if llm.model.quantization is not None and way.trains_all:
        raise ValueError("full fine-tuning needs plain weights: load the model without quantize, or use lora")
    module = _data_module(data, llm, out_dir, options)
    chosen, config = _options(way, base, out_dir, options)
    chosen.check()
    resume = chosen.resume_path(way.suffix)
    fabric = chosen.fabric(f"finetune-{base.name}", base, resume is not None)
    fabric.launch()
    fabric.seed_everything(chosen.seed)
    chosen.hyperparameters = _repeatable(llm, module, chosen, config, precision_of(fabric))
    loaders = connect(fabric, module, tokenizer, chosen.train, base)
    gpt = llm.prepare_for_training()
    dtype = gpt.dtype

    def write_side_files(folder: Path) -> None:
        write_config(base, folder)
        tokenizer.save(folder)

    try:
        gpt.to(compute_dtype(precision_of(fabric)))
        way.prepare(gpt, config)
        run = Run(fabric, gpt, way, module, loaders, chosen, write_side_files, tokenizer)
        if fabric.is_global_zero and chosen.out_dir is not None and isinstance(module, Samples):
            chosen.out_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(list(module.samples), ensure_ascii=False, indent=1)
            (chosen.out_dir / SAMPLES_NAME).write_text(text, encoding="utf-8")
        metrics = run.run(resume)
    finally:
        restore_forward(gpt)
        if method == "lora" and gpt.quantization is None:
            merge_lora_weights(gpt)
            unwrap_lora(gpt)
        elif method == "lora":
            finish_lora(gpt)
        if method == "full" or (method == "lora" and gpt.quantization is None):
            gpt.config = base
        gpt.to(dtype).requires_grad_(gpt.quantization is None).eval()
    llm.prompt_style = getattr(module, "prompt_style", None) or llm.prompt_style
    return metrics


def _data_module(data: Any, llm: "LLM", out_dir: str | Path | None, options: dict[str, Any]) -> DataModule:
    """The data that `finetune` was given; what `options` say of it is taken from them."""
    if isinstance(data, DataModule):
        return data
    settings: dict[str, Any] = {"prompt_style": llm.prompt_style, "mask_prompt": options.pop("mask_prompt", True)}
    if not isinstance(data, str | Path):
        return Samples(data, val_split_fraction=options.pop("val_split_fraction", 0.0), **settings)
    fraction = options.pop("val_split_fraction", None if Path(data).is_dir() else 0.0)
    return JSON(Path(data), val_split_fraction=fraction, **settings)


def _options(
    way: Method, base: Config, out_dir: str | Path | None, options: Mapping[str, Any]
) -> tuple[Options, Config]:
    """`Options`, and the configuration with what the method adds, from keywords."""
    chosen = Options(out_dir=out_dir)
    settings = dict(LORA_DEFAULTS) if way.name == "lora" else {}
    own = {f.name for f in fields(way.config)} - {f.name for f in fields(Config)}
    groups = [chosen, chosen.train, chosen.eval]
    for name, value in options.items():
        if name == "learning_rate":
            chosen.optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": value}}
        elif name in own:
            settings[name] = value
        else:
            group = next((group for group in groups if name in {f.name for f in fields(group)}), None)
            if group is None:
                raise ValueError(f"option {name!r} is not known to fine-tuning by {way.name}")
            setattr(group, name, value)
    chosen.train.__post_init__()
    chosen.eval.__post_init__()
    return chosen, way.config.extending(base, **settings)


def _repeatable(llm: "LLM", data: DataModule, options: Options, config: Config, precision: str) -> dict[str, Any]:
    """The hyperparameters of a run from Python: those of the command that repeats it."""
    shown = {f.name: getattr(options, f.name) for f in fields(options)}
    for name in ("hyperparameters", "step_digits", "resume"):
        del shown[name]
    values = {"checkpoint_dir": llm.checkpoint_dir, **shown, "precision": precision, **_lora_options(config)}
    folder, how = llm.checkpoint_dir, llm.model.quantization
    if how is not None and not (folder is not None and (Path(folder) / QUANTIZED_NAME).is_file()):
        values["quantize"] = how.mode
    values["data"] = data
    if isinstance(data, Samples):
        arguments = {
            name: getattr(data, name) for name in ("mask_prompt", "val_split_fraction", "prompt_style", "seed")
        }
        if options.out_dir is not None:
            arguments["json_path"] = options.out_dir / SAMPLES_NAME
        values["data"] = {"class_path": "litgpt.data.JSON", "init_args": arguments}
    return described(values)


def described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a command as `hyperparameters.yaml` has them."""
    return {name: plain(value) for name, value in arguments.items() if value is not None}


def _settings(method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are a method's own."""
    return {name: value for name, value in arguments.items() if name.startswith(f"{method}_")}


def _lora_options(config: Config) -> dict[str, Any]:
    unset = {"lora_all": None, "lora_rslora": None, "lora_dora": None}
    return unset | config.lora_options() if isinstance(config, LoRAConfig) else {}


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
