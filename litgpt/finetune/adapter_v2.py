"""The command `finetune_adapter_v2`, and what LitGPT's script offers for import."""

from functools import partial
from typing import Any

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup = base.setups["adapter_v2"]
main = partial(base.main, "adapter_v2")
save_adapter_v2_checkpoint = partial(base.save_trained, "adapter_v2")


def fit(fabric: Any, model: Any, optimizer: Any, scheduler: Any, *args: Any) -> dict[str, Any]:
    """As those of the other methods, with an argument `resume` after `devices`. `setup` resumes runs."""
    return base.fit("adapter_v2", fabric, model, optimizer, scheduler, *args[:3], *args[4:])
