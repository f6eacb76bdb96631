"""Data modules: samples for fine-tuning, and texts for pretraining."""

from importlib import import_module
from typing import Any

_MODULES = {
    "Alpaca": "alpaca",
    "Alpaca2k": "alpaca_2k",
    "AlpacaGPT4": "alpaca_gpt4",
    "DataModule": "base",
    "Deita": "deita",
    "FLAN": "flan",
    "JSON": "json_data",
    "LIMA": "lima",
    "LitData": "lit_data",
    "LongForm": "longform",
    "MicroLlama": "microllama",
    "OpenWebText": "openwebtext",
    "SFTDataset": "base",
    "SFTModule": "base",
    "TextFiles": "text_files",
    "TinyLlama": "tinyllama",
    "TinyStories": "tinystories",
    "get_sft_collate_fn": "base",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    """Imports a data module on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
