"""LitGPT's `litgpt.utils`: helpers that scripts import, some of them from other parts of this package."""

import inspect
import json
import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.checkpoint.base import CONFIG_NAME, WEIGHTS_NAME
from litgpt.checkpoint.files import copy_side_files
from litgpt.checkpoint.incremental import incremental_save as incremental_save
from litgpt.checkpoint.load import save_config as save_config
from litgpt.checkpoint.validation import CheckpointValidationResult as CheckpointValidationResult
from litgpt.checkpoint.validation import estimate_model_memory as estimate_model_memory
from litgpt.constants import _BITANDBYTES_AVAILABLE_NOT_EQUAL_0_42_0 as _BITANDBYTES_AVAILABLE_NOT_EQUAL_0_42_0
from litgpt.indexing import batched_index_select as batched_index_select
from litgpt.parallel.links import check_nvlink_connectivity as check_nvlink_connectivity
from litgpt.runners.quantized_weights import num_parameters as num_parameters
from litgpt.scripts.validate import validate_checkpoint as validate_checkpoint
from litgpt.settings import repair_json
from litgpt.train.setting import parse_devices as parse_devices

_TUTORIALS = "https://github.com/Lightning-AI/litgpt/blob/main/tutorials"

# -- folders


def check_valid_checkpoint_dir(
    checkpoint_dir: Path,
    model_filename: str = WEIGHTS_NAME,
    verbose: bool = True,
    raise_error: bool = False,
    ignore_tokenizer_files: bool = False,
) -> None:
    """Check that a folder has a LitGPT checkpoint's files: weights, config and tokenizer.

    If not, print a message to stderr (if `verbose`), and exit, or with `raise_error` raise a `FileNotFoundError`.
    """
    required = [(model_filename,), (CONFIG_NAME,)]
    if not ignore_tokenizer_files:
        required += [("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",)]
    missing = [" OR ".join(names) for names in required if not any((checkpoint_dir / name).is_file() for name in names)]
    if checkpoint_dir.is_dir() and not missing:
        return
    place = f"checkpoint_dir {str(checkpoint_dir.absolute())!r}"
    problem = f"is missing the files: {missing}" if checkpoint_dir.is_dir() else "is not a checkpoint directory"
    if verbose:  # the lines that LitGPT prints: scripts look for them
        local = sorted(path for path in Path("checkpoints").glob("*/*") if path.is_dir())
        print(f"{place} {problem}.\nFind download instructions at {_TUTORIALS}\n", file=sys.stderr)
        if local:
            here = "\n".join(repr(str(path.absolute())) for path in local)
            print(f"You have downloaded locally:\n{here}\n", file=sys.stderr)
        print("See all download options by running:\n litgpt download", file=sys.stderr)
    if raise_error:
        raise FileNotFoundError(f"{place} {problem}.")
    raise SystemExit(1)


def extend_checkpoint_dir(checkpoint_dir: Path) -> Path:
    """The folder itself, or the one of this name below `checkpoints` if there is only that one."""
    below = "checkpoints" / checkpoint_dir
    return checkpoint_dir if checkpoint_dir.is_dir() or not below.is_dir() else below


def auto_download_checkpoint(
    model_name: str | Path, access_token: str | None = None, ignore_tokenizer_files: bool = False
) -> Path:
    """The folder of a model, in any format that this package opens; downloaded from the Hugging Face hub if necessary."""
    from litgpt.checkpoint.find import find_checkpoint

    return find_checkpoint(model_name, access_token or os.environ.get("HF_TOKEN"))


def copy_config_files(source_dir: Path, out_dir: Path) -> None:
    """Copy the files of a checkpoint other than weights: configuration, tokenizer, prompt style."""
    copy_side_files(Path(source_dir), Path(out_dir))
    if (Path(source_dir) / CONFIG_NAME).is_file():
        (Path(out_dir) / CONFIG_NAME).write_bytes((Path(source_dir) / CONFIG_NAME).read_bytes())


def init_out_dir(out_dir: Path) -> Path:
    """The folder for results, if relative below `LIGHTNING_ARTIFACTS_DIR`, if that is set."""
    return Path(os.environ.get("LIGHTNING_ARTIFACTS_DIR", "")) / out_dir


def find_resume_path(resume: bool | Literal["auto"] | Path | None, out_dir: Path) -> Path | None:
    """The checkpoint to resume from: a given path, or the last `step-*` folder's file below `out_dir`; without any, True raises
    a `FileNotFoundError` and "auto" gives None."""
    if resume not in (True, "auto"):
        return resume or None
    found = max(out_dir.rglob("step-*/*.pth"), key=lambda file: int(file.parent.name.split("-")[1]), default=None)
    if found is None and resume != "auto":
        raise FileNotFoundError(f"You passed `--resume=True`, but no checkpoint file was found in {str(out_dir)!r}")
    return found


def check_file_size_on_cpu_and_warn(
    checkpoint_path: str | Path, device: str | torch.device, size_limit: int = 4_509_715_660
) -> int:
    """Size in bytes of a file of weights (0: no file), with a warning if the model will be slow on a CPU."""
    size = os.path.getsize(checkpoint_path) if os.path.exists(checkpoint_path) else 0
    if size > size_limit and str(device) == "cpu":
        warnings.warn(
            f"The file size of {checkpoint_path} is over {size_limit / 2**30:.1f} GB: on a CPU such a model is slow",
            stacklevel=2,
        )
    return size


def fix_and_load_json(s: str) -> Any:
    """Read JSON in which commas are missing at the end of lines, or stand before a closing bracket."""
    try:
        return json.loads(repair_json(s))
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON, nor JSON with wrong commas: {error}") from None


# -- parameters and weights


def reset_parameters(module: nn.Module) -> None:
    """Call `reset_parameters` of a module and of all modules in it that have one."""
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()


def map_old_state_dict_weights(state_dict: dict[str, Any], mapping: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """Rename weights of a state dict, in place, as `mapping` says, of the module that `prefix` names."""
    for old, new in mapping.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
    return state_dict


def load_checkpoint(fabric: Any, model: nn.Module, checkpoint_path: Path, strict: bool = True) -> None:
    """Load a `lit_model.pth` into the model of a Lightning `fabric`, whose strategy may keep it in parts."""
    from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy

    if isinstance(fabric.strategy, FSDPStrategy):
        fabric.load_raw(checkpoint_path, model, strict=strict)
        return
    state_dict = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)
    state_dict = state_dict.get("model", state_dict)
    if isinstance(fabric.strategy, ModelParallelStrategy):
        load_from_full_model_state_dict(model, state_dict, fabric.device, strict, cpu_offload=True)
    else:
        model.load_state_dict(state_dict, strict=strict)


def load_from_full_model_state_dict(
    model: nn.Module, full_sd: Mapping[str, Any], device: torch.device, strict: bool = False, cpu_offload: bool = False
) -> Any:
    """Load a whole model's weights into one whose parameters may be `DTensor`s: each process gets its part of them.

    Layers with LoRA weights have the plain layer's under `.linear`. With `cpu_offload`, what is loaded stays on the CPU.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    own, loaded = model.state_dict(), {}
    for name, tensor in full_sd.items():
        module, _, kind = name.rpartition(".")
        name = name if name in own or f"{module}.linear.{kind}" not in own else f"{module}.linear.{kind}"
        if (like := own.get(name)) is not None:
            tensor = tensor.to(device, like.dtype)
            if isinstance(like, DTensor):
                tensor = distribute_tensor(tensor, like.device_mesh, like.placements)
        loaded[name] = nn.Parameter(tensor.cpu() if cpu_offload else tensor)
    return model.load_state_dict(loaded, strict=strict, assign=True)


def chunked_cross_entropy(
    logits: torch.Tensor | list[torch.Tensor], targets: torch.Tensor, chunk_size: int = 128, ignore_index: int = -100
) -> torch.Tensor:
    """Mean cross-entropy of logits (B, T, V), or of chunks of them along T, for targets (B, T).

    It is computed for `chunk_size` tokens at a time (0: all at once), to save memory in the backward pass. Targets of
    `ignore_index` are ignored; if all are, the loss is 0.
    """
    if isinstance(logits, list):
        if chunk_size == 0:
            return chunked_cross_entropy(torch.cat(logits, dim=1), targets, 0, ignore_index)
        parts = zip(logits, targets.split(logits[0].shape[1], dim=1), strict=True)
    else:
        logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        if chunk_size == 0:
            return F.cross_entropy(logits, targets, ignore_index=ignore_index)
        parts = zip(logits.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [
        F.cross_entropy(x.reshape(-1, x.shape[-1]), y.reshape(-1), ignore_index=ignore_index, reduction="none")
        for x, y in parts
    ]
    return torch.cat(losses).sum() / (targets != ignore_index).sum().clamp(min=1)


# -- settings


def CLI(*args: Any, **kwargs: Any) -> Any:
    """`jsonargparse.CLI`, which also shows the texts below attributes of dataclasses as help."""
    from jsonargparse import CLI, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return CLI(*args, **kwargs)


def capture_hparams() -> dict[str, Any]:
    """The caller's local variables: plain values, dataclasses as dicts, and others as text."""
    plain = (bool, int, float, str, Path, type(None))
    values = inspect.currentframe().f_back.f_locals
    return {
        name: value if isinstance(value, plain) else asdict(value) if is_dataclass(value) else str(value)
        for name, value in values.items()
    }


def get_default_supported_precision(training: bool) -> str:
    """bf16-true, or 16-true on a GPU without bfloat16; in training "-mixed" instead of "-true"."""
    half = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    return f"{'16' if half else 'bf16'}-{'mixed' if training else 'true'}"


def get_argument_names(cls: type) -> set[str]:
    """Names of the arguments that make an object of a class."""
    return {
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def kill_process_tree(pid: int) -> None:
    """Kill a process and all its descendants. Needs the package psutil."""
    import psutil

    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    except psutil.NoSuchProcess:
        pass  # it has ended


# -- training


class CycleIterator:
    """Iterates over an iterable repeatedly; `epoch` counts the complete passes."""

    def __init__(self, iterable: Iterable) -> None:
        self.iterable, self.epoch = iterable, 0
        self._pass: Iterator | None = None

    def __iter__(self) -> "CycleIterator":
        return self

    def __next__(self) -> Any:
        if self._pass is None:
            self._pass = iter(self.iterable)
        for item in self._pass:
            return item
        self._pass, self.epoch = iter(self.iterable), self.epoch + 1
        return next(self._pass)


def instantiate_torch_optimizer(
    optimizer: str | dict[str, Any], model_parameters: Iterable, **kwargs: Any
) -> torch.optim.Optimizer:
    """An optimizer: a name in `torch.optim`, or a class's full name, or {"class_path": ..., "init_args": {...}}.

    `kwargs` are further arguments; those unknown to the class are ignored.
    """
    if not isinstance(optimizer, (str, dict)):
        raise ValueError(f"an optimizer is given by a name or a dict with class_path and init_args, got {optimizer!r}")
    path, given = (optimizer, {}) if isinstance(optimizer, str) else (optimizer["class_path"], optimizer["init_args"])
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module or "torch.optim"), name)
    known = inspect.signature(kind).parameters
    return kind(model_parameters, **{**given, **{key: value for key, value in kwargs.items() if key in known}})


def instantiate_bnb_optimizer(
    optimizer: str | dict[str, Any], model_parameters: Iterable, **kwargs: Any
) -> torch.optim.Optimizer:
    """The paged AdamW of bitsandbytes, for quantised training, in place of the AdamW that `optimizer` names."""
    path, given = (optimizer, {}) if isinstance(optimizer, str) else (optimizer["class_path"], optimizer["init_args"])
    if path.rpartition(".")[2] != "AdamW":
        raise ValueError(f"training with bitsandbytes only supports the AdamW optimizer, got {path!r}")
    import bitsandbytes

    kind = bitsandbytes.optim.PagedAdamW
    return kind(model_parameters, **{k: x for k, x in {**kwargs, **given}.items() if k in get_argument_names(kind)})


def choose_logger(
    logger_name: str,
    out_dir: Path,
    name: str,
    log_interval: int = 1,
    log_args: dict | None = None,
    resume: bool | None = None,
    **kwargs: Any,
) -> Any:
    """A logger of Lightning: csv, tensorboard, wandb or mlflow. `kwargs` are accepted for scripts written for LitGPT."""
    from litgpt.args import LogArgs
    from litgpt.train.setting import make_logger

    if logger_name not in ("csv", "tensorboard", "wandb", "mlflow"):
        raise ValueError(
            f"`--logger_name={logger_name}` is not a valid option. It is csv, tensorboard, wandb or mlflow."
        )
    return make_logger(logger_name, Path(out_dir), name, log_interval, LogArgs(**(log_args or {})), bool(resume))


def load_checkpoint_update(
    fabric: Any, adapter_path: Path, model: nn.Module, checkpoint_path: Path, strict: bool = True
) -> None:
    """`load_checkpoint` for two files, the second of an adapter or LoRA; neither has to be complete."""
    for path in (checkpoint_path, adapter_path):
        load_checkpoint(fabric, model, path, strict=False)


def save_hyperparameters(function: Any, checkpoint_dir: Path, known_commands: Any = None) -> None:
    """Write the command line's options for `function` to `hyperparameters.yaml`."""
    import yaml

    from litgpt.__main__ import COMMANDS, parse
    from litgpt.train.setting import plain

    args = sys.argv[1:]
    name = args[0] if args and args[0] in COMMANDS else function.__name__
    values = parse(name, function, args[args[:1] == [name] :])
    values = {key: plain(value) for key, value in values.items() if value is not None}
    (Path(checkpoint_dir) / "hyperparameters.yaml").write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")


def create_finetuning_performance_report(
    training_time: float, token_counts: Mapping[str, Any], device_type: str
) -> str:
    """The counts and speed of a fine-tuning as a table; `token_counts` are tensors by name, as LoRA's `fit` gives them."""
    from litgpt.train.report import performance_table

    names = ("raw_tokens", "raw_tokens_plus_prompt_template", "raw_tokens_plus_prompt_template_and_padding")
    counts = [int(torch.as_tensor(token_counts.get(name, 0)).sum()) for name in names]
    memory = torch.cuda.max_memory_allocated() / 1e9 if device_type == "cuda" else None
    return performance_table(counts, training_time, memory)


def flops_per_param(max_seq_length: int, n_layer: int, n_embd: int, n_params: int) -> int:
    """Floating-point operations of a forward pass over a sequence: two a parameter and token, and the attention's."""
    return (2 * n_params + n_layer * 2 * 2 * n_embd * max_seq_length) * max_seq_length


def estimate_flops(model: nn.Module, training: bool) -> int:
    """Floating-point operations for a sequence of maximal length. A backward pass counts twice as much as a forward pass, and
    as much for frozen parameters."""
    config, length = model.config, model.max_seq_length
    trained = num_parameters(model, requires_grad=True), 3 if training else 1
    frozen = num_parameters(model, requires_grad=False), 2 if training else 1
    return sum(times * flops_per_param(length, config.n_layer, config.n_embd, n) for n, times in (trained, frozen) if n)


def select_sft_generate_example(eval: Any, data: Any) -> str:
    """The instruction that is answered during training: `eval.evaluate_example` is "first", "random", or an index, in the test
    data or, if that is too short, in the training data."""
    tests = data.test_dataset if hasattr(data, "test_dataset") else data.val_dataset
    index, sets = eval.evaluate_example, (tests.data, data.train_dataset.data)
    if index == "first":
        index = 0
    elif index == "random":
        examples = next(examples for examples in sets if len(examples))
        return examples[random.randint(0, len(examples) - 1)]["instruction"]
    elif not isinstance(index, int):
        raise ValueError(f"evaluate_example must be 'first', 'random' or an index, got {index!r}")
    for examples in sets:
        if index < len(examples):
            return examples[index]["instruction"]
    raise IndexError(f"there is no example {index}, neither in the test nor in the training data")


# -- tests


def _RunIf(thunder: bool = False, **kwargs: Any) -> Any:
    """A `pytest` mark that skips a test without its requirements, given as to Lightning's `_runif_reasons`."""
    import pytest
    from lightning.fabric.utilities.testing import _runif_reasons

    reasons, marks = _runif_reasons(**kwargs)
    if thunder and find_spec("thunder") is None:
        reasons.append("Thunder")
    return pytest.mark.skipif(bool(reasons), reason=f"needs {', '.join(reasons)}", **marks)
