"""Which cache is meant: policy, storage, length and arguments, from and to what people type."""

import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Protocol

import torch

from litgpt.attention import MultiHeadSelfAttention
from litgpt.config import Config
from litgpt.kvcache.base import KVCache
from litgpt.kvcache.baselines import DenseKVCache, LastRecentlyInsertedKVCache
from litgpt.kvcache.blocks import BlockKVCache
from litgpt.kvcache.by_head import ByHeadKVCache
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.policies import POLICIES, Policy, PositionalPolicy
from litgpt.kvcache.policies.dense import DensePolicy
from litgpt.kvcache.policies.lastrec import LastRecentPolicy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.positional import PositionalKVCache
from litgpt.kvcache.score import ScoreKVCache
from litgpt.kvcache.storages import STORAGES, Storage

POLICY_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "h2o-orig": ("h2o", {}),
    "h2o-vlen": ("h2o", {"value_norm": True}),
    "qh2o-vlen": ("qh2o", {"value_norm": True}),
    "smart-lastrec": ("lastrec", {"n_sink": 4}),
}
"""Names of LitGPT's pull request 2061 and the library that goes on from it, with what they are here."""
STORAGE_ALIASES = {
    "torch-quantized8": "int8",
    "bnb-quantized8": "int8",
    "torch-quantized4": "int4",
    "bnb-quantized4": "int4",
}
PYRAMID = 20  # the pyramid's top layer has the mean divided by that, if this is enough for the policy
WINDOW_SLACK = 64  # slots that a sliding-window layer's cache has beyond its window: `crop` is exact within it

KV_CACHES_OF_KINDS: dict[type[Policy], type[PlannedKVCache]] = {
    PositionalPolicy: PositionalKVCache,
    ScorePolicy: ScoreKVCache,
}
"""The cache that works with a kind of policy."""
NAMED_KV_CACHES: dict[type[Policy], type[PlannedKVCache]] = {
    DensePolicy: DenseKVCache,
    LastRecentPolicy: LastRecentlyInsertedKVCache,
}
"""And those that have classes of their own for one policy."""


class HasCaches(Protocol):
    """A model, as far as caches are made for it."""

    config: Config
    mha: MultiHeadSelfAttention
    dtype: torch.dtype

    def layer_device(self, block_idx: int) -> torch.device: ...


@dataclass(frozen=True, init=False)
class CacheSpec:
    """A cache as people ask for it; a value.

    Args:
        policy: which tokens stay: a name in `POLICIES`, or `my_module:MyPolicy` (`my_module.MyPolicy` will do), a class of one's
            own, whose module may be in the current folder.
        storage: how they are kept: a name in `STORAGES`.
        cache_length: all slots of a row and head (None: the policy's default).
        args: arguments of the policy or the storage, such as `n_sink`; and for policies that evict `budget`, how the
            slots are distributed over the layers without a sliding window, `cache_length` being the mean: "uniform",
            "pyramid" (more for lower layers, arXiv:2406.02069), or a list of their shares; or "scores", for policies that read a
            prompt twice: over the heads of all these layers, to those whose tokens score best.

    Raises:
        ValueError: if there is no such policy, storage or argument; it names those that there are.
    """

    policy: str
    storage: str
    cache_length: int | None
    arguments: tuple[tuple[str, Any], ...]

    def __init__(
        self, policy: str = "dense", storage: str = "default", cache_length: int | None = None, **args: Any
    ) -> None:
        if cache_length is not None and (isinstance(cache_length, bool) or not isinstance(cache_length, int)):
            raise ValueError(f"cache_length must be a whole number of slots, got {cache_length!r}")
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
        values = policy, storage, cache_length, tuple(sorted(args.items()))
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)
        _check_pair(self.policy_class, self.storage, self.storage_class)
        known = [*self.policy_class.arguments(), *self.storage_class.arguments()]
        if self.policy_class.evicts:
            known.append("budget")
        for name in args:
            if name not in known:
                has = f"its arguments are {', '.join(known)}" if known else "it has no arguments"
                raise ValueError(f"the key-value cache {str(self)!r} has no argument {name!r}: {has}")
        if self.by_head and not getattr(self.policy_class, "reads_twice", False):
            raise ValueError(
                f"budget='scores' is for policies that read a prompt twice, such as kvzip, and {self.policy} does not: use "
                "another budget or policy"
            )

    @classmethod
    def parse(cls, text: "str | CacheSpec", cache_length: int | None = None, **args: Any) -> "CacheSpec":
        """The cache that `policy` or `policy-storage` names; what is a spec already stays as it is, but for what is given."""
        if isinstance(text, CacheSpec):
            length = text.cache_length if cache_length is None else cache_length
            return cls(text.policy, text.storage, length, **{**dict(text.arguments), **args})
        if not isinstance(text, str):
            raise ValueError(f"a key-value cache is a CacheSpec or the name of one, got {text!r}")
        policy, storage = _split(text)
        policy, own_args = POLICY_ALIASES.get(policy, (policy, {}))
        return cls(policy, STORAGE_ALIASES.get(storage, storage), cache_length, **{**own_args, **args})

    def __str__(self) -> str:
        return self.policy if self.storage == "default" else f"{self.policy}-{self.storage}"

    def __repr__(self) -> str:
        given = {"cache_length": self.cache_length, **dict(self.arguments)}
        parts = [repr(self.policy), repr(self.storage), *(f"{name}={value!r}" for name, value in given.items())]
        return f"CacheSpec({', '.join(parts)})"

    def describe(self) -> dict[str, Any]:
        """All of it, as numbers and text that JSON can hold."""
        arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in self.arguments}
        return {"kv_cache": str(self), "cache_length": self.cache_length, **arguments}

    @property
    def policy_class(self) -> type[Policy]:
        return resolve_policy(self.policy)

    @property
    def storage_class(self) -> type[Storage]:
        if self.storage not in STORAGES:
            raise ValueError(f"no cache storage is called {self.storage!r}; there are {', '.join(STORAGES)}")
        return STORAGES[self.storage]

    @property
    def evicts(self) -> bool:
        """Whether a full cache drops tokens to take others."""
        return self.policy_class.evicts

    @property
    def by_head(self) -> bool:
        """Whether heads get numbers of slots of their own. Such caches hold one row."""
        return dict(self.arguments).get("budget") == "scores"

    def length_for(self, config: Config) -> int:
        """Slots of a row and head for a model; `ValueError` if they are not in 1..its context."""
        length = self.policy_class.default_cache_length(config) if self.cache_length is None else self.cache_length
        if not 1 <= length <= config.block_size:
            raise ValueError(f"cache_length must be in 1..{config.block_size}, the model's context, got {length}")
        return length

    def create(
        self,
        model: "HasCaches | Config",
        batch_size: int,
        device: torch.device | str | Sequence[torch.device] | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[KVCache]:
        """Make a cache for every layer.

        A layer with a sliding window has a cache of the window's last tokens and `WINDOW_SLACK` more, whatever the policy,
        if that takes fewer slots.

        Args:
            model: whose layers they are for; or its configuration alone.
            batch_size: most rows.
            device, dtype: of the buffers; there may be a device for each layer (default: those of the model, or the CPU and
                torch's default dtype).

        Raises:
            ValueError: if a cache cannot have that length, those arguments or that storage.
        """
        config = model if isinstance(model, Config) else model.config
        kwargs: dict[str, Any] = {}
        if not isinstance(model, Config):
            kwargs["mha"] = model.mha
            dtype = model.dtype if dtype is None else dtype
            device = [model.layer_device(i) for i in range(config.n_layer)] if device is None else device
        length = self.length_for(config)
        devices = device if isinstance(device, (list, tuple)) else [device] * config.n_layer
        lengths = self.layer_lengths(config, length)
        return [
            self.create_layer(config, batch_size, block_idx, lengths[block_idx], devices[block_idx], dtype, **kwargs)
            for block_idx in range(config.n_layer)
        ]

    def create_layer(
        self,
        config: Config,
        batch_size: int,
        block_idx: int,
        cache_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> KVCache:
        """The cache of one layer, of `cache_length` slots or those of its window. `kwargs` as for the cache's class."""
        policy = self.layer_policy(config, block_idx, cache_length)
        device = None if device is None else torch.device(device)
        params = KVCacheParams.from_config(config, batch_size, policy.cache_length, device, dtype)
        storage, storage_args = self.storage_class, self.storage_args
        if storage.blocks and policy.evicts:  # a layer with a window
            storage, storage_args = STORAGES["default"], {}
        by_head = self.by_head and isinstance(policy, ScorePolicy)
        return make_kv_cache(config, params, policy, block_idx, storage, storage_args, by_head, **kwargs)

    def layer_lengths(self, config: Config, cache_length: int) -> list[int]:
        """Slots of every layer, by the budget.

        Raises:
            ValueError: if it is no budget, or a layer would have fewer slots than the policy needs, or more than the model's
                context.
        """
        least = self._least_slots(cache_length)
        budget = dict(self.arguments).get("budget", "uniform")
        layers = [i for i in range(config.n_layer) if config.window(i) is None]
        if budget in ("uniform", "scores"):
            shares = [1.0] * len(layers)
        elif budget == "pyramid":
            top = max(1 / PYRAMID, least / cache_length)
            step = 2 * (1 - top) / max(1, len(layers) - 1)
            shares = [2 - top - step * i for i in range(len(layers))] if len(layers) > 1 else [1.0]
        else:
            if not isinstance(budget, tuple) or len(budget) != len(layers) or not all(_is_positive(x) for x in budget):
                raise ValueError(
                    f"budget must be 'uniform', 'pyramid', 'scores', or {len(layers)} positive numbers, one for each layer "
                    f"without a sliding window, got {budget!r}"
                )
            shares = [x * len(layers) / sum(budget) for x in budget]
        lengths = [cache_length] * config.n_layer
        for layer, share in zip(layers, shares, strict=True):
            lengths[layer] = round(share * cache_length)
            if not least <= lengths[layer] <= config.block_size and share != 1:
                raise ValueError(
                    f"budget {budget!r} gives layer {layer} {lengths[layer]} slots; it takes {least}..{config.block_size}: change "
                    "cache_length"
                )
        return lengths

    def _least_slots(self, cache_length: int) -> int:
        """The fewest slots, of at most `cache_length`, for which there is a policy with these arguments."""
        for slots in range(2, cache_length):
            with suppress(ValueError):
                return self.make_policy(slots).cache_length
        return cache_length

    def layer_policy(self, config: Config, block_idx: int, cache_length: int) -> Policy:
        """The policy of one layer: with `cache_length` slots, or that of its window."""
        window = config.window(block_idx)
        if window is not None and window + WINDOW_SLACK < cache_length:
            return LastRecentPolicy(window + WINDOW_SLACK)
        if window is not None and issubclass(self.policy_class, ScorePolicy):
            return LastRecentPolicy(cache_length)
        return self.make_policy(cache_length)

    def make_policy(self, cache_length: int) -> Policy:
        """The policy for a cache of that many slots."""
        policy = self.policy_class
        return policy(cache_length, **self._among(policy.arguments()))

    def size(self, model: "HasCaches | Config", batch_size: int, dtype: torch.dtype | None = None) -> tuple[int, dict]:
        """Bits that the caches of all layers will take, in total and by part; nothing is allocated."""
        parts: dict[str, int] = {}
        for cache in self.create(model, batch_size, torch.device("meta"), dtype):
            for name, bits in cache.size_estimate()[1].items():
                parts[name] = parts.get(name, 0) + bits
        return sum(parts.values()), parts

    @property
    def storage_args(self) -> dict[str, Any]:
        """The arguments that are the storage's."""
        return self._among(self.storage_class.arguments())

    def _among(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name, value in self.arguments if name in names}


def make_kv_cache(
    config: Config,
    params: KVCacheParams,
    policy: Policy,
    block_idx: int,
    storage: type[Storage] | None = None,
    storage_args: Mapping[str, Any] | None = None,
    by_head: bool = False,
    **kwargs: Any,
) -> KVCache:
    """The cache of a policy and a storage for layer `block_idx`, perhaps one whose heads get slots of their own; `kwargs` as for its
    class."""
    kind = NAMED_KV_CACHES.get(type(policy)) or next(
        (cache for kind, cache in KV_CACHES_OF_KINDS.items() if isinstance(policy, kind)), None
    )
    if kind is None:
        kinds = ", ".join(kind.__name__ for kind in KV_CACHES_OF_KINDS)
        raise ValueError(f"{type(policy).__name__} is of no kind of policy that there are caches for: {kinds}")
    storage = STORAGES["default"] if storage is None else storage
    if storage.blocks:
        _check_pair(type(policy), next((name for name, one in STORAGES.items() if one is storage), ""), storage)
        kind = BlockKVCache
    if by_head:
        kind = ByHeadKVCache
    kind = kind.made_of(policy, storage, storage_args)
    return kind.from_policy(config, params, policy, block_idx, storage=storage, storage_args=storage_args, **kwargs)


def resolve_policy(name: str) -> type[Policy]:
    """The policy that is called `name`, or that `my_module:MyPolicy` or `my_module.MyPolicy` imports.

    Raises:
        ValueError: if there is none.
    """
    if name in POLICIES:
        return POLICIES[name]
    module_name, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not module_name:
        near = get_close_matches(name, POLICIES, n=1)
        hint = f" (dense-{name} is one)" if name in STORAGES else f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"no key-value cache is called {name!r}{hint}; the policies are {', '.join(POLICIES)}, and module:Class for one of "
            "your own"
        )
    try:
        policy = getattr(_import(module_name), attribute, None)
    except ImportError as error:
        raise ValueError(f"the cache policy {name!r} cannot be imported: {error}") from None
    if not (isinstance(policy, type) and issubclass(policy, Policy) and is_dataclass(policy)):
        raise ValueError(f"{attribute!r} of the module {module_name!r} is no cache policy, a class derived from Policy")
    return policy


def _check_pair(policy: type[Policy], name: str, storage: type[Storage]) -> None:
    """Raise `ValueError` if a storage is not for that policy."""
    if storage.blocks and policy is not DensePolicy:
        raise ValueError(
            f"the storage {name} is for dense caches, which keep whole groups of tokens: use int4 with others"
        )


def _import(name: str) -> Any:
    if not _is_path(name):
        raise ImportError(f"{name!r} is not the name of a module")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = os.getcwd()
        if error.name != name.partition(".")[0] or here in sys.path:
            raise
        sys.path.append(here)  # scripts of installed commands have their own folder there instead
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        except ImportError:
            sys.path.remove(here)
            raise


def _is_path(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _is_positive(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0


def _split(text: str) -> tuple[str, str]:
    """Policy and storage of `policy-storage`; either may have a dash itself."""
    parts = text.split("-")
    for count in range(len(parts), 0, -1):
        policy, storage = "-".join(parts[:count]), "-".join(parts[count:]) or "default"
        imported = policy.replace(":", ".")
        known = policy in POLICIES or policy in POLICY_ALIASES or ("." in imported and _is_path(imported))
        if known and (storage in STORAGES or storage in STORAGE_ALIASES):
            return policy, storage
    policy, _, storage = text.partition("-")
    return policy, storage or "default"
