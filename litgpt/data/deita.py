"""What scripts written for LitGPT import from here."""

from litgpt.data.instruction_sets import Deita as Deita
from litgpt.data.instruction_sets import samples_of_messages as format_dataset  # noqa: F401
