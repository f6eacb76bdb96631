"""A loss on what caches keep that score tokens by the attention they get: what decides about evictions has no gradients else.

A token that a head needs later stays only if it gets attention all the time until then. So the newest tokens of every chunk have
to attend to it as much, and a margin more, as to the middle one of the stored tokens. What a head needs, the attention of its own
queries says, those of tokens which the loss of next tokens counts, to all before them, evicted or not: prose, which other heads
predict, is hardly changed.

Letters: G key/value heads, a query heads that share each, N tokens of all rows, n stored ones of a row, T tokens of a row in a
chunk, K needed ones, D head size.
"""

from collections.abc import Sequence

import torch

from litgpt.kvcache import CacheSpec
from litgpt.kvcache.policies import ScorePolicy
from litgpt.model import GPT
from litgpt.train.chunks import Chunk
from litgpt.train.stored_tokens import StoredTokens

NEWEST = 32  # tokens of a chunk that have to attend to the needed ones; all, where all are looked at
LOOKING = 16  # tokens of a chunk, at most, that say which ones are needed
NEEDED = 64  # tokens, at most, that have to be attended to
N_SINK = 4  # first tokens of a row, which get attention anyway
MARGIN = 1.0  # of the logarithms
MARGIN_OF_SUMS = 2.0  # where what tokens got is summed up, in which older ones are ahead


def check_keeps_by_attention(spec: CacheSpec) -> None:
    """Raise `ValueError` for caches whose policy does not look at what tokens attend to."""
    kind = spec.policy_class
    if not issubclass(kind, ScorePolicy) or (
        kind.n_queries is ScorePolicy.n_queries and kind.observe is ScorePolicy.observe
    ):
        raise ValueError(
            f"{spec.policy} does not keep tokens by the attention they get, which keep_loss teaches: leave it out, or train through "
            "h2o, snapkv or tova"
        )


class KeepLoss:
    """Of one pass through a model: `counted` (N,) says which tokens' next ones the loss counts. What `terms` sum up to is zero, and has the
    gradient of the loss of all layers, its mean over layers, chunks and heads."""

    def __init__(self, counted: torch.Tensor, gpt: GPT) -> None:
        self.counted, self.scale, self.n_layer = counted, gpt.mha.scale, gpt.config.n_layer
        self.terms: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []  # of layers and chunks, after the backward pass


class LayerKeepLoss:
    """The part of one layer, whose chunks come last to first. `sums_up`: its policy sums up what all tokens attend to."""

    def __init__(self, of_all: KeepLoss, tokens: StoredTokens, begins: Sequence[int], sums_up: bool) -> None:
        self.of_all, self.tokens, self.begins = of_all, tokens, begins
        self.newest = slice(None) if sums_up else slice(-NEWEST, None)
        self.margin = MARGIN_OF_SUMS if sums_up else MARGIN
        self.needed: dict[int, torch.Tensor] = {}  # of rows: (G, tokens), the attention of counted tokens to each

    @torch.enable_grad()  # in a backward pass
    def chunk(
        self, chunk: Chunk, query: torch.Tensor, key: torch.Tensor, stored: torch.Tensor, filled: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For every row that has a loss in a chunk: the loss, the places (1, G, K) of needed tokens, and their keys (1, G, K, D), from which
        it has gradients, as it has from the others.

        Args:
            query, key: of the chunk's tokens, (1, a * G, T of all rows, D) and (1, G, T of all rows, D).
            stored: keys (B, G, n, D) that the chunk finds, of which those in the first `filled[row]` slots of a row are there.
        """
        queries, found = query[0].unflatten(0, (key.shape[1], -1)).to(exact(query.dtype)), []
        parts = zip(chunk.rows, chunk.starts, queries.split(chunk.sizes, 2), key[0].split(chunk.sizes, 1), strict=True)
        for row, start, q, own in parts:
            begin, old = self.begins[row], stored[row, :, : filled[row]]
            if row in self.needed and start > N_SINK and old.shape[1] > N_SINK:
                found.append(self._loss(self.needed[row], q, own, old, begin, start))
            self._look(row, q, own, begin, start)
        return found

    def _loss(
        self, needed: torch.Tensor, q: torch.Tensor, own: torch.Tensor, old: torch.Tensor, begin: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        past = needed[:, N_SINK:start]
        weights, places = past.topk(min(NEEDED, past.shape[1]), sorted=False)
        weights = weights / needed.sum(-1, keepdim=True)
        places, K = (places + begin + N_SINK)[None], weights.shape[1]
        leaf = self.tokens.at(places)[0].requires_grad_()
        scores = _scores(q[:, :, self.newest], torch.cat((old, own), dim=1), self.of_all.scale, leaf[0])
        middle = scores[:, K + N_SINK : K + old.shape[1]].detach().median(-1, keepdim=True).values
        loss = (weights * (middle + self.margin - scores[:, :K]).relu()).sum(-1).mean()
        self.of_all.losses.append(loss.detach())
        return loss, places, leaf

    @torch.no_grad()
    def _look(self, row: int, q: torch.Tensor, own: torch.Tensor, begin: int, start: int) -> None:
        """Add what the row's counted tokens of a chunk attend to."""
        end = begin + start + own.shape[1]
        looking = self.of_all.counted[begin + start : end].nonzero()[:, 0]
        if not (n := len(looking)):
            return
        looking = looking[:: -(-n // LOOKING)]
        keys = own if not start else torch.cat((self.tokens.at([[(begin, begin + start)]])[0][0], own), dim=1)
        seen = _logits(q[:, :, looking], keys, start + looking, self.of_all.scale).softmax(-1)
        seen = seen.mean(1).sum(1) * (n / len(looking))
        if row not in self.needed:  # no later token is counted
            self.needed[row] = seen
        else:
            self.needed[row][:, : seen.shape[1]] += seen


def exact(dtype: torch.dtype) -> torch.dtype:
    """What sums are in."""
    return torch.promote_types(dtype, torch.float32)


def _logits(q: torch.Tensor, keys: torch.Tensor, last: torch.Tensor, scale: float) -> torch.Tensor:
    """(G, a, t, k) of queries (G, a, t, D) for keys (G, k, D) up to the one that `last` (t,) says."""
    hidden = torch.arange(keys.shape[1], device=keys.device) > last[:, None]
    return (q @ keys.to(q.dtype).mT[:, None] * scale).masked_fill(hidden, -torch.inf)


def _scores(q: torch.Tensor, keys: torch.Tensor, scale: float, others: torch.Tensor) -> torch.Tensor:
    """The logarithms (G, K + k) of the weights, summed over queries (G, a, t, D), those of the last tokens among `keys` (G, k, D), of K
    `others` as they would be if they were alone with `keys`, and of `keys`."""
    k, t = keys.shape[1], q.shape[2]
    logits = _logits(q, keys, torch.arange(k - t, k, device=q.device), scale)
    total = logits.logsumexp(-1, keepdim=True)
    logits = torch.cat((q @ others.to(q.dtype).mT[:, None] * scale, logits), dim=-1)
    return (logits - total).flatten(1, 2).logsumexp(1)
