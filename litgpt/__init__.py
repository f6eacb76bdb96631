"""A toolkit for language models whose key-value cache is a first-class part."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.api import LLM as LLM
    from litgpt.config import Config as Config
    from litgpt.model import GPT as GPT
    from litgpt.prompts import PromptStyle as PromptStyle
    from litgpt.tokenizer import Tokenizer as Tokenizer

_EXPORTS = {
    "Config": "litgpt.config",
    "GPT": "litgpt.model",
    "LLM": "litgpt.api",
    "PromptStyle": "litgpt.prompts",
    "Tokenizer": "litgpt.tokenizer",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use, so that `import litgpt.config` does not import torch."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("litgpt")
        except PackageNotFoundError:
            value = "0+unknown"
    elif name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
