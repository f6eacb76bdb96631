"""A toolkit for language models whose key-value cache is a first-class part."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.api import LLM as LLM
    from litgpt.checkpoint.validation import CheckpointValidationResult as CheckpointValidationResult
    from litgpt.checkpoint.validation import estimate_model_memory as estimate_model_memory
    from litgpt.config import Config as Config
    from litgpt.model import GPT as GPT
    from litgpt.prompts import PromptStyle as PromptStyle
    from litgpt.scripts.validate import validate_checkpoint as validate_checkpoint
    from litgpt.tokenizer import Tokenizer as Tokenizer

_EXPORTS = {
    "CheckpointValidationResult": "litgpt.checkpoint.validation",
    "Config": "litgpt.config",
    "GPT": "litgpt.model",
    "LLM": "litgpt.api",
    "PromptStyle": "litgpt.prompts",
    "Tokenizer": "litgpt.tokenizer",
    "estimate_model_memory": "litgpt.checkpoint.validation",
    "validate_checkpoint": "litgpt.scripts.validate",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports an exported name, or a module, on first use, so that `import litgpt.config` does not import torch."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("litgpt")
        except PackageNotFoundError:
            value = "0+unknown"
    elif name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
    else:
        try:
            value = import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
