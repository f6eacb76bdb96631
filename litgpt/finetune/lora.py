"""The command `finetune_lora`, and what LitGPT's script offers for import."""

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup, main, fit, save_lora_checkpoint = base.functions_of("lora")
