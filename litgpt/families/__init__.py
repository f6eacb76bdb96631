"""One module per family of models, holding every fact about it; none of them imports torch."""

from functools import cache
from importlib import import_module
from typing import Any

_MODULES = ("neox", "falcon", "stablelm", "llama", "mistral", "olmo", "gemma", "phi", "qwen")


@cache
def named_models() -> dict[str, dict[str, Any]]:
    """Every named model as keyword arguments of `Config`, keyed by name."""
    models: dict[str, dict[str, Any]] = {}
    for module in _MODULES:
        models |= import_module(f"litgpt.families.{module}").MODELS
    return models
