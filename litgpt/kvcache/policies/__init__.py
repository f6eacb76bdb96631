"""Cache policies, one a file: which tokens stay. A file in this folder is all that a new one takes."""

import importlib
import pkgutil

from litgpt.kvcache.policies.base import POLICIES, Policy, PositionalPolicy, register_policy
from litgpt.kvcache.policies.score import ScorePolicy

__all__ = ["POLICIES", "Policy", "PositionalPolicy", "ScorePolicy", "register_policy"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
