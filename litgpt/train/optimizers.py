"""Optimizers by name or by class."""

import inspect
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import torch


def resolve_optimizer(optimizer: str | Mapping[str, Any]) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and arguments that `--optimizer` names.

    Args:
        optimizer: a class of `torch.optim` ("AdamW"), an import path ("bitsandbytes.optim.AdamW8bit"), or a mapping with
            `class_path` and perhaps `init_args`. `ValueError` if there is no such class, or it does not take these arguments.
    """
    path, arguments = optimizer, {}
    if isinstance(optimizer, Mapping):
        path, arguments = optimizer.get("class_path"), dict(optimizer.get("init_args") or {})
        if extra := sorted(set(optimizer) - {"class_path", "init_args"}):
            raise ValueError(f"optimizer: {extra} not known; expected class_path and init_args")
    if not isinstance(path, str) or not path:
        raise ValueError(f"optimizer must be a name or a mapping with class_path, got {optimizer!r}")
    try:
        kind = resolve_name(path if "." in path else f"torch.optim.{path}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"optimizer {path!r} does not exist: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(f"{path!r} is not an optimizer class")
    parameters = inspect.signature(kind).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if (unknown := sorted(set(arguments) - set(parameters))) and not open_ended:
        raise ValueError(f"optimizer {path} does not take {', '.join(unknown)}; it takes {', '.join(parameters)}")
    return kind, arguments


def make_optimizer(
    optimizer: str | Mapping[str, Any], parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """An optimizer of `parameters`, with one pass over them instead of one for every operation where it can (fused)."""
    kind, arguments = resolve_optimizer(optimizer)
    if "fused" in inspect.signature(kind).parameters and not {"fused", "foreach"} & set(arguments):
        arguments["fused"] = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    try:
        return kind(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer {kind.__name__} with {arguments}: {error}") from None


def reserve_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the numbers that a fused Adam or AdamW keeps for every weight, as its first step would: between the holes that
    activations leave they would cost the next step new memory."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for p in group["params"] if group["fused"] and not group["amsgrad"] else ():
            averages = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **averages}
