"""The command `finetune_full`, and what LitGPT's script offers for import."""

from functools import partial

from litgpt.finetune import base
from litgpt.finetune.base import *  # noqa: F403

setup = base.setups["full"]
main = partial(base.main, "full")
fit = base.fit_state
