"""Log-probabilities of continuations, many at a time, with what contexts have in common computed once.

How requests are put together depends on them and the caches alone, so that scores do not depend on any batch size.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from litgpt.engine.caches import CacheLease, prepare_caches
from litgpt.engine.engine import check_vocabulary
from litgpt.engine.loading import choose_kv_caches
from litgpt.engine.prefill import prefill, uninterrupted_size
from litgpt.engine.second_reading import reading_twice
from litgpt.eval.tree import Node, Tokens, assign_rows, tree_of
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.layers import LayerCaches
from litgpt.model import GPT

CALL_TOKENS = 1024  # most tokens of a call
SLOTS = 8192  # most slots of all rows together, unless one row has more
MOST_ROWS = 64
LOGITS = 256  # most tokens whose logits are in memory together


class Request(NamedTuple):
    """Tokens whose log-probability is asked for, and those before them, at least one of either."""

    context: Tokens
    continuation: Tokens

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


class Score(NamedTuple):
    """The log-probability of each token of a continuation, in nats, and whether each is the likeliest one."""

    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class Scorer:
    """Scores continuations under caches of its own.

    A context enters caches that evict as a prompt does, and its continuation follows.

    Args:
        model: in evaluation mode.
        spec: which caches.
        prompt_chunksize: most tokens of a prefill call (None: as many as the caches take).
    """

    def __init__(self, model: GPT, spec: CacheSpec | None = None, prompt_chunksize: int | None = None) -> None:
        self.model = model
        self.prompt_chunksize = prompt_chunksize
        self.spec = CacheSpec() if spec is None else spec
        self._lease = CacheLease(model, LayerCaches())
        self._rows = 0  # of caches other than default ones
        if self.spec != CacheSpec():
            self._lease.run(choose_kv_caches, model, self.spec, 1)
            caches = self._lease.caches
            if caches.takes_rows_apart and not reading_twice(caches.caches):
                self._rows = max(1, min(MOST_ROWS, SLOTS // max(cache.cache_length for cache in caches.caches)))
                self._lease.run(choose_kv_caches, model, self.spec, self._rows)
            else:
                self._rows = 1

    @property
    def max_length(self) -> int:
        """Most tokens of a context and its continuation; for caches that take any number, the model's context."""
        caches, context = self._lease.caches, self.model.max_seq_length
        return context if self._rows == 0 or caches.max_length is None else min(context, caches.max_length)

    def score(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Score]:
        """The scores of requests, in their order.

        Raises:
            ValueError: for empty, unknown or too many tokens, before any work.
        """
        for request in requests:
            if not request.context or not request.continuation:
                raise ValueError("a context and its continuation need at least one token each")
            check_vocabulary([*request.context, *request.continuation], self.model.config.padded_vocab_size)
            if len(request) > self.max_length + 1:
                raise ValueError(
                    f"context and continuation have {len(request)} tokens, the model or its cache takes {self.max_length}"
                )
        scores: list[Score | None] = [None] * len(requests)
        done = 0
        for numbers in self._waves(requests):
            found = self._lease.run(self._score, [requests[i] for i in numbers])
            for i, score in zip(numbers, found, strict=True):
                scores[i] = score
            done += len(numbers)
            progress(done, len(requests))
        return scores

    # -- which requests are computed together

    def _waves(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Numbers of requests that are computed together: of similar length, and those that begin alike."""
        longest: dict[Tokens, int] = defaultdict(int)
        for request in requests:
            longest[request.context] = max(longest[request.context], len(request))
        groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            bucket = 1 << (longest[request.context] - 1).bit_length()
            groups[self.model.needs_long_rope(len(request)), bucket].append(i)
        for (_, bucket), numbers in sorted(groups.items()):
            size = self._rows or max(1, min(MOST_ROWS, SLOTS // bucket))
            numbers.sort(key=lambda i: requests[i])
            for at in range(0, len(numbers), size):
                yield numbers[at : at + size]

    # -- one wave

    @torch.inference_mode()
    def _score(self, requests: Sequence[Request]) -> list[Score]:
        longest = max(map(len, requests)) - 1
        if self._rows == 0:
            bucket = min(1 << longest.bit_length(), self.model.max_seq_length)
            prepare_caches(self.model, len(requests), max(bucket, longest))
        self.model.expect_length(longest)
        contexts: dict[Tokens, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            contexts[request.context].append(i)
        evicts = not self.model.caches.is_chunk_invariant(longest)
        roots = tree_of(contexts, share=not evicts)
        _add_continuations(roots, requests)
        self._found: list[list[tuple[float, bool]]] = [[] for _ in requests]
        self._requests = requests
        n_rows, level, is_first = assign_rows(roots), roots, True
        self.model.caches.start(n_rows)
        while level:
            if is_first and evicts:
                self._prefill(level)
            else:
                self._run(level)
            is_first = False
            copies = list(range(n_rows))
            for node in level:
                for child in node.children:
                    copies[child.row] = node.row
            if copies != list(range(n_rows)):
                self.model.caches.reorder(copies)
            level = [child for node in level for child in node.children]
        return [Score([x for x, _ in found], all(right for _, right in found)) for found in self._found]

    def _prefill(self, nodes: Sequence[Node]) -> None:
        """Run whole contexts as prompts."""
        prompts = [torch.tensor(node.tokens, device=self.model.device) for node in nodes]
        rows = [node.row for node in nodes] if len(self.model.caches.row_lengths) > 1 else None
        logits = prefill(self.model, prompts, self.prompt_chunksize, 0, rows)
        numbers = [(at, i) for at, node in enumerate(nodes) for i in node.requests]
        self._note([i for _, i in numbers], logits[[at for at, _ in numbers]])

    def _run(self, nodes: Sequence[Node]) -> None:
        """Run the tokens of nodes, in calls of many rows."""
        left = [(node, 0) for node in nodes if node.tokens]
        while left:
            calls, room, rest = [], CALL_TOKENS, []
            lengths = self.model.caches.row_lengths
            for node, done in left:
                size = 0
                if room:
                    total, chunksize = len(node.tokens) - done, min(room, self.prompt_chunksize or room)
                    size = uninterrupted_size(self.model, total, chunksize, lengths[node.row], [node.row])
                    calls.append((node, node.tokens[done : done + size]))
                    room -= size
                if done + size < len(node.tokens):
                    rest.append((node, done + size))
            idx = torch.tensor([token for _, tokens in calls for token in tokens], device=self.model.device)
            sizes, rows = [len(tokens) for _, tokens in calls], [node.row for node, _ in calls]
            x = self.model(idx[None], max(lengths[row] for row in rows), skip_lm_head=True, rows=rows, row_sizes=sizes)[
                0
            ]
            unfinished, at, places, numbers = {id(node) for node, _ in rest}, 0, [], []
            for node, tokens in calls:
                predicting = range(at, at + len(tokens)) if node.is_continuation else [at + len(tokens) - 1]
                if node.is_continuation or id(node) not in unfinished:
                    for i in node.requests:
                        places += predicting
                        numbers += [i] * len(predicting)
                at += len(tokens)
            for some in range(0, len(places), LOGITS):
                which = slice(some, some + LOGITS)
                self._note(numbers[which], self.model.logits(x[places[which]]))
            left = rest

    def _note(self, numbers: Sequence[int], logits: torch.Tensor) -> None:
        """Note how likely logits (n, V) make the next token of the requests with these numbers."""
        wanted, counts = [], [len(found) for found in self._found]
        for i in numbers:
            wanted.append(self._requests[i].continuation[counts[i]])
            counts[i] += 1
        logits, index = logits.float(), torch.tensor(wanted, device=logits.device)
        logprobs = logits.gather(1, index[:, None])[:, 0] - logits.logsumexp(-1)
        greedy = logits.argmax(-1) == index
        for i, logprob, right in zip(numbers, logprobs.tolist(), greedy.tolist(), strict=True):
            self._found[i].append((logprob, right))


def _add_continuations(roots: Sequence[Node], requests: Sequence[Request]) -> None:
    """Let continuations of more than one token follow their contexts."""
    for node in roots:
        _add_continuations(node.children, requests)
        for i in node.requests:
            if tokens := requests[i].continuation[:-1]:
                node.children.append(Node(tokens, requests=[i], is_continuation=True))
