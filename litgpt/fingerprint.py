"""A short identifier of a model, from its configuration and a few values of every weight."""

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import nn

from litgpt.kvcache import KVCache

VALUES = 32  # of every weight
# Fields that do not change a token's keys and values
_IRRELEVANT = ("name", "hf_config", "block_size", "vocab_size", "padding_multiple")


def sample(weight: torch.Tensor) -> torch.Tensor:
    """Up to `VALUES` values of a weight, from places spread over its rows and columns, (n,) float64."""
    flat = weight.detach().reshape(-1)
    size, count = flat.numel(), min(flat.numel(), VALUES)
    part = torch.arange(count, device=flat.device)
    # one value of each of `count` equal parts, at a different place in each so that they are not all in one column
    return flat[part * size // count + part * 7919 % max(size // max(count, 1), 1)].double()


def fingerprint(model: nn.Module) -> str:
    """An identifier of 16 letters, computed in milliseconds. It is the same for every layout of the weights
    (`litgpt.runners.packed_weights`), and another one after training, merging or quantising.

    Biases are left out, since some layouts do not keep them apart.
    """
    fields = {key: value for key, value in model.config.to_dict().items() if key not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, values in sorted(_samples(model, ""), key=lambda pair: pair[0]):
        digest.update(name.encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _samples(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Samples by the weights' names in plain layers. Modules with another layout have `weight_samples`."""
    if isinstance(module, KVCache):
        return
    if hasattr(module, "weight_samples"):
        yield from ((prefix + name, values) for name, values in module.weight_samples().items())
        return
    tensors = dict(module.named_parameters(recurse=False))
    passing = module._non_persistent_buffers_set
    tensors |= {name: x for name, x in module.named_buffers(recurse=False) if name not in passing}
    yield from ((prefix + name, sample(x)) for name, x in tensors.items() if not name.endswith("bias"))
    for name, child in module.named_children():
        yield from _samples(child, f"{prefix}{name}.")
