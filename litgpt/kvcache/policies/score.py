"""The kind of policy that scores the tokens in the cache, and keeps the best."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from litgpt.kernels import ops
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.policies.base import Policy
from litgpt.kvcache.tokens import CachedTokens

LONGEST_TAIL = 64  # slots of the tail, where no number is given


@dataclass(frozen=True)
class ScorePolicy(Policy):
    """A policy that scores the tokens of every row and head when all slots are taken: the best `cache_length - tail` stay, and
    free the slots of the next `tail` tokens.

    What a policy of one's own defines is `scores`. One that looks at queries says how many by `n_queries`. One that sums up
    what queries see has `slot_state` numbers for every token, and `observe`, which is called once for every `tail` tokens, and
    for a prompt at once. Both are shown `CachedTokens`.

    Args:
        cache_length: C, all slots, the tail's included.
        tail: P, tokens between two evictions. 1 evicts as the literature has it, token by token; more costs slots and saves time
            (None: a sixteenth of the slots, at most 64).
        n_sink: first tokens of a sequence that always stay (None: 4, or a quarter of what stays).
        recent: newest tokens that always stay (None: 32, or a quarter of what stays).
        run: tokens that stay or go together, after ChunkKV (arXiv:2502.00299): runs of that many positions share their mean score.
    """

    tail: int = field(default=None)  # type: ignore[assignment]
    n_sink: int = field(default=None)  # type: ignore[assignment]
    recent: int = field(default=None)  # type: ignore[assignment]
    run: int = 1

    slot_state: ClassVar[int] = 0  # S, own numbers of every token
    reads_twice: ClassVar[bool] = False  # whether prompts longer than the cache are read a second time before tokens go
    unrotates: ClassVar[bool] = False  # whether it looks at keys or queries as they were before RoPE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_length < 2:
            raise ValueError(
                f"a cache that scores its tokens needs a cache_length of at least 2, got {self.cache_length}"
            )
        self._default("tail", min(LONGEST_TAIL, max(1, self.cache_length // 16)))
        self._check("tail", 1, self.cache_length - 1)
        self._default("n_sink", min(4, self.kept // 4))
        self._check("n_sink", 0, self.kept - 1)
        self._default("recent", min(self._default_recent(), self.kept - self.n_sink))
        self._check("recent", 1, self.kept - self.n_sink)
        self._check("run", 1, None)

    def _default_recent(self) -> int:
        return max(1, min(32, self.kept // 4))

    def _default(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check(self, name: str, least: int, most: int | None) -> None:
        value = getattr(self, name)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or value < least
            or (most is not None and value > most)
        ):
            allowed = (
                f"at least {least}" if most is None else f"in {least}..{most} with cache_length={self.cache_length}"
            )
            raise ValueError(f"{name} must be {allowed}, got {value!r}")

    # -- what a policy defines

    @abstractmethod
    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """How much each token is worth, (B, G, N), or (B, 1, N) for all heads alike, float32."""

    @property
    def n_queries(self) -> int:
        """Of how many of the last tokens the queries are kept for `scores`."""
        return self.tail if self.observes else 0

    def observe(self, tokens: CachedTokens) -> None:
        """Take what the queries of the tail, or of a whole prompt, see into `tokens.slot_state` or `tokens.row_state`."""

    @classmethod
    def row_state(cls, params: KVCacheParams) -> int:
        """F, own numbers of every row and head."""
        return 0

    @property
    def pooled(self) -> int | None:
        """Whether scores are attention weights, summed over the heads that share keys, for kernels: of all queries, which `slot_state`
        has (1), or of the last ones, averaged over so many neighbours. None: they are something else."""
        return None

    # -- what follows

    @property
    def pooled_by_kernels(self) -> int | None:
        """`pooled`, unless a class that is derived from the one which says it scores otherwise."""
        own = next(kind for kind in type(self).__mro__ if vars(kind).keys() & {"scores", "observe", "best", "pooled"})
        return self.pooled if "pooled" in vars(own) and self.run == 1 else None

    @property
    def observes(self) -> bool:
        """Whether every query has to be looked at."""
        return type(self).observe is not ScorePolicy.observe

    @property
    def kept(self) -> int:
        """Slots that are in use after an eviction."""
        return self.cache_length - self.tail

    @property
    def longest_prompt(self) -> int:
        """Most tokens that begin a sequence without being looked at."""
        return self.tail if self.observes else self.cache_length

    def room(self, filled: int, tail: int) -> int:
        """Tokens for which there is room with so many slots in use, and so many tokens since the policy last looked."""
        free = self.cache_length - filled
        return min(free, self.tail - tail) if self.observes else free

    def best(self, tokens: CachedTokens) -> torch.Tensor:
        """Slots of the tokens that stay, (B, G, `kept`), ascending. Of equal scores the newer token's is better."""
        B, G, N = tokens.shape
        scores = self._own_scores(tokens)
        if self.run == 1 and ops.can_choose_slots(scores):
            return ops.choose_slots(scores, self.n_sink, self.recent, self.kept)
        slots = torch.arange(N, device=scores.device)
        order = self._ranked(scores, tokens).long() << 32 | slots  # all different
        fewer = min(self.kept, N - self.kept)
        found = order.topk(fewer, dim=-1, largest=fewer == self.kept, sorted=False).indices
        stays = torch.full_like(order, fewer != self.kept, dtype=torch.bool).scatter_(-1, found, fewer == self.kept)
        place = torch.where(stays, stays.cumsum(-1) - 1, self.kept)
        index = torch.empty_like(order[..., : self.kept + 1]).scatter_(-1, place, slots.expand(B, G, N))
        return index[..., : self.kept]

    def ranks(self, tokens: CachedTokens) -> torch.Tensor:
        """Whole numbers (B, G, N), int32, in the order of the scores; the largest one for tokens that always stay."""
        return self._ranked(self._own_scores(tokens), tokens)

    def _own_scores(self, tokens: CachedTokens) -> torch.Tensor:
        return self.scores(tokens).float().expand(tokens.shape)

    def _ranked(self, scores: torch.Tensor, tokens: CachedTokens) -> torch.Tensor:
        scores = scores.nan_to_num(nan=-torch.inf)
        if self.run > 1:
            scores = _mean_of_runs(scores, tokens.positions.expand(tokens.shape) // self.run)
        bits = (scores + 0.0).view(torch.int32)  # + 0.0: of two zeros none is less
        slots = torch.arange(scores.shape[-1], device=scores.device)
        stays = (slots < self.n_sink) | (slots >= scores.shape[-1] - self.recent)
        return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(stays, 0x7FFFFFFF)


def _mean_of_runs(scores: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """The mean score of the tokens that are in the same run as each (B, G, N)."""
    first = torch.zeros_like(runs[..., :1])
    index = torch.cat((first, (runs.diff(dim=-1) != 0).long().cumsum(-1)), dim=-1)
    sums = torch.zeros_like(scores).scatter_add_(-1, index, scores)
    counts = torch.zeros_like(scores).scatter_add_(-1, index, torch.ones_like(scores))
    return (sums / counts.clamp(min=1)).gather(-1, index)
