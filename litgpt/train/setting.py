"""Devices, precision and loggers of a run, by the names that people give them."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning import Fabric
from lightning.fabric import loggers as fabric_loggers
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import nn
from torch.distributed.fsdp import fully_shard

from litgpt.args import LogArgs
from litgpt.config import Config
from litgpt.model import Block
from litgpt.prompt_style import PromptStyle

_logger = logging.getLogger("litgpt")

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]
Strategy = Literal["auto", "ddp", "fsdp"]
PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true")


def parse_devices(devices: int | str) -> int:
    """How many devices `devices` means: a number, or "auto" (-1): all GPUs, or one CPU process."""
    if devices in ("auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1)
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    raise ValueError(f"devices must be 'auto' or a positive integer, got {devices!r}")


def make_logger(
    name: str, out_dir: Path, run_name: str, log_interval: int, log: LogArgs | None = None, resume: bool = False
) -> Any:
    """A logger of Lightning; `ValueError` if there is none of that name, or its package is missing (without tensorboard: csv)."""
    _check("logger_name", name, get_args(LoggerName))
    log = log or LogArgs()
    project = log.project or run_name
    try:
        if name == "wandb":
            return WandbLogger(project=project, resume=resume, name=log.run, group=log.group)
        if name == "mlflow":
            import mlflow

            # MLflow's own default, since Lightning's is a folder of files, which MLflow 3 refuses
            return MLFlowLogger(experiment_name=project, run_name=log.run, tracking_uri=mlflow.get_tracking_uri())
        if name == "tensorboard":
            return fabric_loggers.TensorBoardLogger(out_dir / "logs", name="tensorboard")
    except ModuleNotFoundError as error:
        if name != "tensorboard":
            raise ValueError(f"logger {name!r} needs a package that is not installed: {error}") from None
        # the default of `pretrain`, which cannot be told from a choice: no reason to stop
        _logger.warning(
            "tensorboard is not installed (pip install tensorboard): losses go to logs/csv, as with --logger_name csv"
        )
    return fabric_loggers.CSVLogger(out_dir / "logs", name="csv", flush_logs_every_n_steps=log_interval)


def divide_parameters(model: nn.Module, device_mesh: Any) -> nn.Module:
    """Divide the parameters of a `TrainingModel` among processes (FSDP): a layer's are gathered when it runs."""
    mesh = device_mesh["data_parallel"]
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_fabric(options: Any, run_name: str, config: Config, resumed: bool) -> Fabric:
    """A `Fabric` with the devices, the precision and the logger that `options` (`litgpt.train.options`) say, not launched yet;
    `ValueError` for a strategy or precision that is not known."""
    loggers = []
    if options.out_dir is not None or options.logger_name not in ("csv", "tensorboard"):  # which write to it
        interval = options.train.log_interval
        loggers = [make_logger(options.logger_name, options.out_dir, run_name, interval, options.log, resumed)]
    devices, precision = parse_devices(options.devices), options.precision
    if precision is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16-mixed" if bf16 else "16-mixed" if torch.cuda.is_available() else "32-true"
    precision = f"{precision}-true" if precision in ("32", "16", "bf16") else precision
    _check("precision", precision, PRECISIONS)
    _check("strategy", options.strategy, get_args(Strategy))
    strategy = "auto"
    if options.divides_weights:
        sizes = {"data_parallel_size": options.processes, "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(divide_parameters, **sizes, save_distributed_checkpoint=False)
    elif options.processes > 1:
        strategy = DDPStrategy(find_unused_parameters=bool(config.n_expert), broadcast_buffers=False)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # the new option syncs them once
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # where no token is counted first
    warnings.filterwarnings("ignore", message="The .*dataloader.* does not have many workers")
    nodes = options.num_nodes
    return Fabric(devices=devices, num_nodes=nodes, strategy=strategy, precision=precision, loggers=loggers)


def _check(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}")


def precision_of(fabric: Fabric) -> str:
    """The precision that a `Fabric` works in, by Lightning's name."""
    return fabric.strategy.precision.precision


def weights_dtype(fabric: Fabric) -> torch.dtype:
    """Data type of the weights under the precision of a `Fabric`."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision_of(fabric), torch.float32)


def plain(value: Any) -> Any:
    """An option as YAML has it, such that `--config` gives it again: groups as mappings, objects by class and arguments. Secrets
    are left out."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(x) for key, x in value.items() if key != "access_token"}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    kind = value if isinstance(value, type) else type(value)
    package = "litgpt.data" if kind.__module__.startswith("litgpt.data.") else kind.__module__
    path = f"{package}.{kind.__qualname__}"
    if value is kind:
        return path
    known = {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD}
    if isinstance(value, PromptStyle):
        arguments = value.init_args()
        names = [name for name, style in PromptStyle.styles.items() if style is kind]
        if names and not arguments:
            return names[0]
    else:  # without those that are None by default
        found = {name: getattr(value, name) for name in known if hasattr(value, name)}
        arguments = {name: x for name, x in found.items() if not (x is None is known[name])}
    arguments = plain(arguments)
    if package == "litgpt.args":
        return arguments
    further = {name: x for name, x in arguments.items() if name not in known}  # of `**kwargs`
    content = {"class_path": path, "init_args": {name: x for name, x in arguments.items() if name in known}}
    return content | ({"dict_kwargs": further} if further else {})
