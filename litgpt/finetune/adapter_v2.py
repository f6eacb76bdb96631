"""The command `finetune_adapter_v2`, and what LitGPT's script offers for import."""

from typing import Any

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup, main, _fit, save_adapter_v2_checkpoint = base.functions_of("adapter_v2")


def fit(fabric: Any, model: Any, optimizer: Any, scheduler: Any, *args: Any) -> dict[str, Any]:
    """As those of the other methods, with an argument `resume` after `devices`. `setup` resumes runs."""
    return _fit(fabric, model, optimizer, scheduler, *args[:3], *args[4:])
