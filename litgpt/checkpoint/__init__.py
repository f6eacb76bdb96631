"""One door to weights on disk: a Hugging Face folder, a LitGPT folder or a GGUF file."""

from litgpt.checkpoint.base import Checkpoint, open_checkpoint
from litgpt.checkpoint.load import load_model, save_litgpt

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "save_litgpt"]
