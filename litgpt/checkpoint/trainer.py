"""Checkpoints of a Lightning Trainer."""

import re
from pathlib import Path

import torch

_GPT_KEY = re.compile(r"\b(lm_head|transformer)\..*")  # after a prefix of module names


def trainer_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights by the names of `GPT`, whatever module had the model as its part."""
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    found = {_GPT_KEY.search(key): value for key, value in state.get("state_dict", state).items()}
    return {match[0]: value for match, value in found.items() if match}
