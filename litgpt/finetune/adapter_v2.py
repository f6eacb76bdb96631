"""The command `finetune_adapter_v2`, and what LitGPT's script offers for import."""

from typing import Any

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup, main, _fit, save_adapter_v2_checkpoint = base.functions_of("adapter_v2")


def fit(
    fabric: Any,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    train_dataloader: Any,
    val_dataloader: Any,
    devices: int,
    resume: Any,
    checkpoint_dir: Any,
    out_dir: Any,
    train: Any,
    eval: Any,
    data: Any,
    num_nodes: int = 1,
) -> dict[str, Any]:
    """As those of the other methods, with an argument `resume` after `devices`. `setup` resumes runs."""
    loaders, folders = (train_dataloader, val_dataloader), (checkpoint_dir, out_dir)
    return _fit(fabric, model, optimizer, scheduler, *loaders, devices, *folders, train, eval, data, num_nodes)
