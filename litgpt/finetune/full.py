"""The command `finetune_full`, and what LitGPT's script offers for import."""

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup, main, fit, _ = base.functions_of("full")
