"""One door to weights on disk: a Hugging Face folder, a LitGPT folder or a GGUF file."""

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.load import load_model, save_litgpt
from litgpt.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "save_litgpt"]
