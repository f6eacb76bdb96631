"""The command `finetune_adapter_v2`, and what LitGPT's script offers for import."""

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup, main, fit, save_adapter_v2_checkpoint = base.functions_of("adapter_v2")
