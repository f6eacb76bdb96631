"""The generation engine: sampling, stopping, prefill and decode steps, sessions; it prints nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.engine.session import Session as Session

_EXPORTS = {"Session": "litgpt.engine.session"}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use: one command's module does not import all that others need."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
