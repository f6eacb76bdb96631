"""Checkpoints of a run, and how to resume from one."""

import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule


def step_folders(out_dir: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    found = [path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The optimizer step of a step checkpoint."""
    return int(folder.name.removeprefix("step-"))


def remove_old(out_dir: Path, keep_last: int | None, losses: Mapping[int, float]) -> None:
    """Remove all but the last `keep_last` step checkpoints (None: keep all) and the one with the lowest of the validation `losses`,
    which are by steps."""
    folders = step_folders(out_dir)
    best = min((f for f in folders if step_of(f) in losses), key=lambda f: losses[step_of(f)], default=None)
    for folder in folders[:-keep_last] if keep_last is not None else []:
        if folder != best:
            shutil.rmtree(folder, ignore_errors=True)


def full_tensors(model: nn.Module, keep: Callable[[str, torch.Tensor], bool]) -> dict[str, torch.Tensor]:
    """Weights by name, gathered from all processes where they are divided. All processes have to call it."""
    kept = ((name, x) for name, x in model.state_dict().items() if keep(name, x))
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach() for name, x in kept}


def is_divided(model: nn.Module) -> bool:
    """Whether processes have a part of each parameter."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _divide_again(model: nn.Module) -> None:
    """Free what was gathered for the last forward pass: an optimizer knows the divided parameters only."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_parameters(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give `model` some of its parameters, whole; each process takes its part where they are divided. `ValueError` if the model
    has no such parameter, or of another shape."""
    own = model.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"{name} {tuple(value.shape)} does not fit the model")
    if is_divided(model):
        _divide_again(model)
        set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, strict=False))
        return
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, gathered where it is divided. All processes have to call it."""
    if not is_divided(model):
        return optimizer.state_dict()
    _divide_again(model)
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned; `ValueError` if parameters were divided and are not now, or the other way round."""
    divided = is_divided(model)
    if divided != any(isinstance(key, str) for key in state["state"]):
        raise ValueError("its parameters were divided otherwise (strategy): resume with the strategy of the first run")
    if divided:
        _divide_again(model)
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)


def random_state() -> dict[str, Any]:
    """The state of the random number generators of this process."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Load what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
