"""The generation engine: sequences, prefill and decode steps, sampling, stopping, draft tokens, sessions; it prints nothing."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Answer": "answer",
    "ContinuousBatch": "continuous",
    "Draft": "drafting",
    "DraftModel": "drafting",
    "Drafter": "drafting",
    "Engine": "engine",
    "PrefixStore": "prefixes",
    "PromptLookup": "drafting",
    "Sampling": "sampling",
    "Sequence": "sequence",
    "Session": "session",
    "decode": "engine",
    "prepare_caches": "caches",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use: one command's module does not import all that others need."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
