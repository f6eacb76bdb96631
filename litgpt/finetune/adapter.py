"""The command `finetune_adapter`, and what LitGPT's script offers for import."""

from functools import partial

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup = base.setups["adapter"]
main = partial(base.main, "adapter")
fit = partial(base.fit, "adapter")
save_adapter_checkpoint = partial(base.save_trained, "adapter")
