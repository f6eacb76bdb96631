"""Fine-tuning: from a checkpoint or a loaded model to a tuned one."""

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Fabric

from litgpt.checkpoint.base import CONFIG_NAME, QUANTIZED_NAME, Checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model, save_litgpt
from litgpt.checkpoint.open import open_checkpoint, open_lora
from litgpt.config import ADAPTER_FIELDS, Config
from litgpt.data import JSON, Alpaca, DataModule
from litgpt.data.json_data import Samples
from litgpt.lora import finish_lora, merge_lora_weights, unwrap_lora
from litgpt.model import GPT
from litgpt.settings import read_yaml
from litgpt.train.methods import METHODS, Method
from litgpt.train.model import restore_forward
from litgpt.train.options import FinetuneOptions, LoRAOptions
from litgpt.train.run import Run, connect
from litgpt.train.setting import make_fabric, precision_of, weights_dtype

if TYPE_CHECKING:
    from litgpt.api import LLM

SAMPLES_NAME = "samples.json"


def finetune_command(method: str, options: FinetuneOptions) -> dict[str, float]:
    """What the commands `finetune_*` do, by full, lora, adapter or adapter_v2. Returns metrics: see `Run.run`."""
    way = METHODS[method]
    if options.data is None:
        options.data = Alpaca()
    options.check()
    checkpoint = open_checkpoint(find_checkpoint(options.checkpoint_dir, options.access_token))
    way.check(checkpoint.quantization)
    options.check_model(checkpoint.config)
    resume = options.resume_path(way.suffix)
    fabric = make_fabric(options, f"finetune-{checkpoint.config.name}", checkpoint.config, resume is not None)
    config = way.extend(checkpoint.config, options, **_adapter_fields(way, checkpoint))
    options.describe(precision_of(fabric), config)
    return fabric.launch(tune, way, checkpoint, config, options, resume)


def _adapter_fields(way: Method, checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of an adapter that are in the checkpoint's own config file, where LitGPT reads them."""
    path = Path(checkpoint.path) / CONFIG_NAME
    values = read_yaml(path) if path.is_file() else {}
    return {name: values[name] for name in ADAPTER_FIELDS if name in way.fields and name in values}


def tune(
    fabric: Fabric, way: Method, checkpoint: Checkpoint, config: Config, options: FinetuneOptions, resume: Path | None
) -> dict[str, float]:
    """Fine-tune a checkpoint's model in the processes of `fabric`: see `finetune_command`. `config` has what `way` adds."""
    fabric.seed_everything(options.seed)
    tokenizer = checkpoint.tokenizer()
    loaders = connect(fabric, options.data, tokenizer, options.train, checkpoint.config)
    gpt = load_model(checkpoint, weights_dtype(fabric), fabric.device, quantize=options.quantize)
    tie(gpt, checkpoint.tied, options.train.tie_embeddings)
    way.prepare(gpt, config)
    run = Run(fabric, gpt, checkpoint.config, way, options, loaders, checkpoint.copy_side_files, tokenizer)
    metrics = run.run(resume)
    if fabric.is_global_zero:
        final = options.out_dir / "final"
        if way.name == "lora":
            del gpt, run
            gc.collect()  # the run's objects refer to one another; their memory goes to the merged weights
            save_litgpt(open_lora(final), final)
        if way.name in ("lora", "full"):
            fabric.print(f"Chat with the result: litgpt chat {final}")
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

    With several devices, each of their processes runs the whole script, and has the tuned LLM in the end.
    LoRA's matrices are merged into the weights in the end; next to quantised weights they stay, as adapters do.

    Args:
        llm: loaded; with quantised weights for all methods but full.
        data: samples (mappings with `instruction` and `output`, or with `messages`), the path of a JSON or JSONL file, or a
            data module. Samples and files are rendered in the `llm`'s own prompt style, and only responses are learned;
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
    way.check(llm.model.quantization)
    chosen, config = _options(way, llm, data, out_dir, options)
    chosen.check()
    chosen.check_model(base)
    if chosen.divides_weights:
        raise ValueError("strategy='fsdp' leaves the weights divided, and no LLM to generate with: use 'ddp'")
    resume = chosen.resume_path(way.suffix)
    fabric = make_fabric(chosen, f"finetune-{base.name}", base, resume is not None)
    fabric.launch()
    fabric.seed_everything(chosen.seed, verbose=False)
    _describe(chosen, llm, config, precision_of(fabric))
    loaders = connect(fabric, chosen.data, tokenizer, chosen.train, base)
    with _tuning(llm.prepare_for_training(), way, config, weights_dtype(fabric)) as gpt:
        run = Run(fabric, gpt, base, way, chosen, loaders, tokenizer.save, tokenizer)
        if fabric.is_global_zero and out_dir is not None and isinstance(chosen.data, Samples):
            chosen.out_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(list(chosen.data.given), ensure_ascii=False, indent=1)
            (chosen.out_dir / SAMPLES_NAME).write_text(text, encoding="utf-8")
        metrics = run.run(resume)
    llm.prompt_style = getattr(chosen.data, "prompt_style", None) or llm.prompt_style
    return metrics


@contextmanager
def _tuning(gpt: GPT, way: Method, config: Config, dtype: torch.dtype) -> Iterator[GPT]:
    """The model with what a method trains; in the end ready to generate, with what it has learned until then."""
    base, own_dtype = gpt.config, gpt.dtype
    try:
        gpt.to(dtype)
        way.prepare(gpt, config)
        yield gpt
    finally:
        restore_forward(gpt)
        if way.name == "lora" and gpt.quantization is None:
            merge_lora_weights(gpt)
            unwrap_lora(gpt)
            gpt.config = base
        elif way.name == "lora":
            finish_lora(gpt)
        gpt.to(own_dtype).requires_grad_(gpt.quantization is None).eval()


def _data_module(data: Any, llm: "LLM", options: dict[str, Any]) -> DataModule:
    """The data that `finetune` was given, as `options` say, which lose these settings."""
    if isinstance(data, DataModule):
        return data
    is_path = isinstance(data, str | Path)
    if isinstance(data, Mapping) or not (is_path or hasattr(data, "__len__")):
        raise ValueError(f"data must be a list of samples, the path of a file, or a data module, got {data!r}")
    settings = {"prompt_style": llm.prompt_style, "mask_prompt": options.pop("mask_prompt", True)}
    none_validate = None if is_path and Path(data).is_dir() else 0.0  # a folder has a file that does
    settings["val_split_fraction"] = options.pop("val_split_fraction", none_validate)
    return JSON(Path(data), **settings) if is_path else Samples(given=data, **settings)


def _options(
    way: Method, llm: "LLM", data: Any, out_dir: str | Path | None, keywords: dict[str, Any]
) -> tuple[FinetuneOptions, Config]:
    """Options, and the configuration with what the method adds, from keywords."""
    kind = LoRAOptions if way.name == "lora" else FinetuneOptions
    if (rate := keywords.pop("learning_rate", None)) is not None:
        keywords["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate}}
    given = {"checkpoint_dir": llm.checkpoint_dir, "out_dir": out_dir, "data": _data_module(data, llm, keywords)}
    of_run = [f.name for f in fields(kind) if f.name not in ("checkpoint_dir", "quantize", "access_token")]
    given |= {name: keywords.pop(name) for name in of_run if name in keywords}
    further = {name: keywords.pop(name) for name in way.fields & keywords.keys()}
    chosen = kind(**given)
    for name in ("train", "eval"):
        group = getattr(chosen, name)
        changes = {f.name: keywords.pop(f.name) for f in fields(group) if f.name in keywords}
        setattr(chosen, name, replace(group, **changes))
    for name in keywords:
        known = [f.name for group in (chosen.train, chosen.eval) for f in fields(group)]
        near = get_close_matches(name, ["learning_rate", *of_run, *known, *way.fields], n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ValueError(f"option {name!r} is not known to fine-tuning by {way.name}{hint}")
    return chosen, way.extend(llm.model.config, chosen, **further)


def _describe(options: FinetuneOptions, llm: "LLM", config: Config, precision: str) -> None:
    """Note the hyperparameters of a run from Python: those of the command that repeats it."""
    changed: dict[str, Any] = {"resume": None}
    folder, how = llm.checkpoint_dir, llm.model.quantization
    if how is not None and (folder is None or not (Path(folder) / QUANTIZED_NAME).is_file()):
        changed["quantize"] = how.mode
    if isinstance(data := options.data, Samples):
        names = ("mask_prompt", "val_split_fraction", "prompt_style", "seed")
        arguments = {name: getattr(data, name) for name in names}
        if options.out_dir is not None:
            arguments["json_path"] = options.out_dir / SAMPLES_NAME
        changed["data"] = {"class_path": "litgpt.data.JSON", "init_args": arguments}
    options.describe(precision, config, **changed)


def tie(gpt: GPT, tied: bool, tie_embeddings: bool | None) -> None:
    """Have embedding and head share their weight, or not, as `tie_embeddings` says (None: as in the checkpoint, `tied`)."""
    shared = gpt.lm_head.weight is gpt.transformer.wte.weight
    if (tied if tie_embeddings is None else tie_embeddings) and not shared:
        gpt.lm_head.weight = gpt.transformer.wte.weight
    elif tie_embeddings is False and shared:
        gpt.lm_head.weight = torch.nn.Parameter(gpt.transformer.wte.weight.detach().clone())
