"""The memory of a device, and which caches fit into it."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from litgpt.config import Config
from litgpt.kvcache.spec import CacheSpec, HasCaches
from litgpt.kvcache.storages import STORAGES

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Memory that is left on `device`; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:  # a container's own limit
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(left, int(limit) - int(used))
    except (OSError, ValueError):
        return left


def check_fits(spec: CacheSpec, model: HasCaches, rows: int, length: int, held: int = 0) -> None:
    """Check that the caches of `spec` for `rows` sequences of `length` tokens fit into what is left on the model's device and
    `held` bytes, those of caches that they replace.

    Raises:
        ValueError: if they do not: what they need, what is left, and caches that would fit.
    """
    config, dtype = model.config, model.dtype
    host = spec.storage_class.on_host
    device, *others = {torch.device("cpu") if host else model.layer_device(i) for i in range(config.n_layer)}
    available = None if others else available_bytes(device)
    if available is None or (needed := size_in_bytes(spec, config, rows, length, dtype)) <= available + held:
        return
    others = [f"--kv_cache {fitting}" for fitting in fitting_caches(config, rows, length, dtype, available)]
    remedy = " or ".join(others[:2]) if others else "fewer or shorter sequences, or another model"
    raise ValueError(
        f"the {spec} caches of {rows} sequence{'s' * (rows != 1)} of {length:,} tokens need {as_text(needed)}, but "
        f"{as_text(available)} are left on {device}: what fits is {remedy}"
    )


def size_in_bytes(spec: CacheSpec, config: Config, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that the caches of all layers take for `rows` sequences of `length` tokens."""
    return for_length(spec, length).size(config, rows, dtype)[0] // 8


def for_length(spec: CacheSpec, length: int) -> CacheSpec:
    """`spec`, with slots for `length` tokens if it evicts none and its own length is open."""
    if spec.cache_length is not None or spec.evicts:
        return spec
    return CacheSpec.parse(spec, cache_length=length)


def fitting_caches(config: Config, rows: int, length: int, dtype: torch.dtype, available: int) -> Iterator[str]:
    """Caches in `available` bytes, as options of a command: dense ones, those of the most bits first, then one that evicts. Only the
    default one grows with its sequence, others are made for as many tokens as the options say."""
    sizes = []
    for storage in STORAGES:
        with suppress(ValueError):  # not for this model
            spec = CacheSpec("dense", storage)
            if not spec.storage_class.on_host:
                slots = f" --cache_length {length}" if spec != CacheSpec() and length < config.block_size else ""
                sizes.append((size_in_bytes(spec, config, rows, length, dtype), f"{spec}{slots}"))
    yield from (name for size, name in sorted(sizes, reverse=True) if size <= available)
    slots = largest(lambda n: size_in_bytes(_evicting(n), config, rows, length, dtype) <= available, config.block_size)
    if slots >= 64:
        yield f"{_evicting(slots)} --cache_length {slots // 64 * 64}"


def _evicting(slots: int) -> CacheSpec:
    return CacheSpec("lastrec", cache_length=slots)


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest n in 1..`most` for which `holds(n)`, which is true up to some n and false beyond; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def as_text(number: float) -> str:
    """A number of bytes with its unit: 512 bytes, 46.1 kB, 269 MB, 1.63 GB."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"
