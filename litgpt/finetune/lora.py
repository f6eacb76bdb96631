"""The command `finetune_lora`, and what LitGPT's script offers for import."""

from functools import partial

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup = base.setups["lora"]
main = partial(base.main, "lora")
fit = partial(base.fit, "lora")
save_lora_checkpoint = partial(base.save_trained, "lora")
