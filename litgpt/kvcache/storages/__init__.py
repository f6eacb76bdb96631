"""Cache storages, one a file: how keys and values are kept. A file in this folder is all that a new one takes."""

import importlib
import pkgutil

from litgpt.kvcache.storages.base import STORAGES, Storage, register_storage

__all__ = ["STORAGES", "Storage", "register_storage"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
