"""The command `finetune_adapter_v2`, and what LitGPT's script offers for import."""

from functools import partial

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup = base.setups["adapter_v2"]
main = partial(base.main, "adapter_v2")
fit = partial(base.fit, "adapter_v2")
save_adapter_v2_checkpoint = partial(base.save_trained, "adapter_v2")
