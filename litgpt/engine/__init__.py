"""The generation engine: sequences, prefill and decode steps, sampling, stopping, draft tokens, sessions; it prints nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.engine.answer import Answer as Answer
    from litgpt.engine.caches import prepare_caches as prepare_caches
    from litgpt.engine.continuous import ContinuousBatch as ContinuousBatch
    from litgpt.engine.drafting import Draft as Draft
    from litgpt.engine.drafting import Drafter as Drafter
    from litgpt.engine.drafting import DraftModel as DraftModel
    from litgpt.engine.drafting import PromptLookup as PromptLookup
    from litgpt.engine.engine import Engine as Engine
    from litgpt.engine.engine import decode as decode
    from litgpt.engine.sampling import Sampling as Sampling
    from litgpt.engine.sequence import Sequence as Sequence
    from litgpt.engine.session import Session as Session

_EXPORTS = {
    "Answer": "answer",
    "ContinuousBatch": "continuous",
    "Draft": "drafting",
    "DraftModel": "drafting",
    "Drafter": "drafting",
    "Engine": "engine",
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
