"""The caches that the contract is about, with their references, and how tests bring tokens to them."""

import dataclasses
import math

import pytest
import torch

from litgpt.config import Config
from litgpt.kvcache import KVCacheParams
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.storages import STORAGES
from litgpt.kvcache.testing import create_kv_cache

from .reference import ReferenceCache
from .score_reference import LOOKING, SCORES, ScoreReference

D = 8  # head size
SLOTS, ROOM = 12, 36  # cache length of evicting caches, and of dense ones


def score_defaults(policy: str, kept: int) -> tuple[int, int]:
    """First and newest tokens that stay where no numbers are given."""
    return min(4, kept // 4), max(1, kept // 2 if policy in ("h2o", "qh2o") else min(32, kept // 4))


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache to be tested, and what its attention is like."""

    name: str
    n_sink: int = 0
    heads: tuple[int, int] = (4, 2)  # H, G
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    slots: int | None = None
    tail: int | None = None  # of policies that score tokens

    def __str__(self):
        if self.tail is not None:
            return f"{self.name}-tail{self.tail}-{self.heads[0]}:{self.heads[1]}-{str(self.dtype)[6:]}"
        window = "full" if self.window is None else f"window{self.window}"
        cap = "" if self.softcap is None else "-softcap"
        return f"{self.name}-n_sink{self.n_sink}-{self.heads[0]}:{self.heads[1]}-{window}{cap}-{str(self.dtype)[6:]}"

    @property
    def evicts(self) -> bool:
        return not self.name.startswith("dense")

    @property
    def storage(self) -> str:
        return self.name.partition("-")[2]

    @property
    def cache_length(self) -> int:
        return self.slots or (SLOTS if self.evicts else ROOM)

    @property
    def config(self) -> Config:
        H, G = self.heads
        return Config(
            n_layer=2,
            n_embd=H * D,
            n_head=H,
            n_query_groups=G,
            block_size=4096,
            sliding_window_size=self.window,
            sliding_window_indices=None if self.window is None else [0, 1],
            attention_logit_softcapping=self.softcap,
        )

    @property
    def looks(self) -> bool:
        """Whether the policy looks at every query."""
        return self.name.split("-")[0] in LOOKING

    def params(self, batch: int) -> KVCacheParams:
        return KVCacheParams.from_config(
            self.config, batch, self.cache_length, device=torch.device("cpu"), dtype=self.dtype
        )

    def cache(self, batch: int = 2) -> PlannedKVCache:
        return self.make(self.params(batch))

    def make(self, params: KVCacheParams, config: Config | None = None) -> PlannedKVCache:
        """The cache for the last layer of a configuration (default: the case's own)."""
        config = config or self.config
        return create_kv_cache(self.name, params, config.n_layer - 1, config, **self.args)

    @property
    def args(self) -> dict[str, int]:
        args = {"n_sink": self.n_sink} if self.n_sink else {}
        return args if self.tail is None else {**args, "tail": self.tail}

    def reference(self) -> ReferenceCache | ScoreReference:
        if self.tail is not None:
            policy = self.name.split("-")[0]
            sinks, recent = score_defaults(policy, self.cache_length - self.tail)
            return ScoreReference(
                1 / math.sqrt(D),
                SCORES[policy],
                self.cache_length,
                self.tail,
                self.n_sink or sinks,
                recent,
                self.looks,
                softcap=self.softcap,
                layer=self.config.n_layer - 1,
                as_stored=self.as_stored,
            )
        capacity = self.cache_length if self.evicts else None
        cut = 1 / math.sqrt(D), capacity, self.n_sink, self.window, self.softcap
        return ReferenceCache(*cut, as_stored=self.as_stored)

    def as_stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the case's storage gives them back."""
        stored = STORAGES[self.storage](self.params(1)).as_stored(key, value)
        return stored.keys(), stored.values()

    def tokens(self, T: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        H, G = self.heads
        return tuple(2 * torch.randn(batch, heads, T, D, dtype=self.dtype) for heads in (H, G, G))

    def close(self, output: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = 1e-5 if self.dtype == torch.float32 else 0.1
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=0 if tolerance < 1e-4 else 0.05)


CACHES = [Case("dense-default"), Case("lastrec-default"), Case("lastrec-default", n_sink=3)]
for _storage in STORAGES:
    if not STORAGES[_storage].blocks and _storage != "default":  # those have tests of their own: `test_kivi`
        CACHES += [Case(f"dense-{_storage}"), Case(f"lastrec-{_storage}", n_sink=3)]
# with a window, one longer and one shorter than what an evicting cache keeps
KINDS = CACHES + [
    dataclasses.replace(case, window=window)
    for case in CACHES
    for window in (5, 20)
    if case.storage == "default" or (case.storage, window) == ("int8", 5)
]
SCORED = [
    Case(f"{name}-default", tail=tail)
    for name, policy in POLICIES.items()
    if issubclass(policy, ScorePolicy)
    for tail in (4, 1)
]
SCORED += [
    Case(f"h2o-{storage}", tail=4) for storage in STORAGES if storage != "default" and not STORAGES[storage].blocks
]
KINDS += SCORED
CACHES += [case for case in SCORED if case.tail == 4]
every_cache = pytest.mark.parametrize("case", CACHES, ids=str)
every_kind = pytest.mark.parametrize("case", KINDS, ids=str)


def call(cache, query, key, value, rows=None, static=False):
    """One call for chosen rows, as the model makes it: plan, run, commit."""
    lengths = cache.row_lengths if rows is None else [cache.row_lengths[row] for row in rows]
    plan = cache.plan(max(lengths, default=0), key.shape[0], key.shape[2], rows, static)
    output = cache.run(plan, query, key, value)
    cache.commit(plan)
    return output


def feed(cache, tokens, cuts, start=0):
    """Bring tokens (query, key, value) to a cache, cut into calls. Returns the outputs of all, (B, T, H * D)."""
    outputs = []
    for query, key, value in zip(*(x[:, :, : sum(cuts)].split(cuts, dim=2) for x in tokens), strict=True):
        B, _, T, _ = key.shape
        outputs.append(cache(query, key, value, torch.zeros(B, T, dtype=torch.int64), start))
        start += T
    return torch.cat(outputs, dim=1)


def follow(reference, tokens, cuts):
    """What `feed` is to return."""
    reference.start(tokens[1], tokens[1].shape[0])
    parts = zip(*(x.split(cuts, dim=2) for x in tokens), strict=True)
    return torch.cat([reference.call(*part) for part in parts], dim=1)


def snapshot(cache):
    """Everything that a call may change, as comparable values."""
    buffers = {name: buffer.clone() for name, buffer in cache.named_buffers()}
    return buffers, cache.row_lengths, cache.next_token_pos, cache.token_positions().tolist()


def unchanged(cache, before):
    buffers, *rest = snapshot(cache)
    return rest == list(before[1:]) and all(torch.equal(buffers[name], x) for name, x in before[0].items())


def go_on(cache, tokens):
    """Outputs of a decode step, a chunk, and another decode step for all rows."""
    return torch.cat([call(cache, *part) for part in zip(*(x.split((1, 6, 1), 2) for x in tokens), strict=True)], 1)
