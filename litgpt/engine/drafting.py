"""Sources of draft tokens: the text so far, or a smaller model."""

from collections import abc
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad

from litgpt.engine.caches import CacheLease, prepare_caches
from litgpt.engine.drawing import draw_from
from litgpt.engine.prefill import prefill
from litgpt.engine.sampling import check_tokens, likeliest, probabilities
from litgpt.engine.sequence import Sequence
from litgpt.kvcache.layers import LayerCaches
from litgpt.model import GPT

FIRST_DRAFT = 3  # initial draft length of a prompt lookup: a call of four tokens takes hardly longer than one of two


class Draft(NamedTuple):
    """Draft tokens (n,), and the distributions (n, V) that they were drawn from (None: they are certain)."""

    tokens: list[int]
    distributions: torch.Tensor | None = None


class Drafter(Protocol):
    """Drafts the next tokens of sequences. Verification makes the output exact, however bad the drafts are."""

    def draft(self, sequences: abc.Sequence[Sequence], limits: abc.Sequence[int]) -> list[Draft]:
        """A draft for every sequence, of at most as many tokens as its limit. A sequence is the same object in all steps."""


class PromptLookup:
    """Drafts the continuation of an earlier occurrence of the last tokens, in the prompt or in the output.

    It needs no model, and pays off where the output repeats text: editing, quoting, code, lists. A lookup takes constant time for
    texts of any length. Drafts get shorter after rejected ones, and longer after accepted ones.

    Args:
        max_draft: most draft tokens at a time.
        max_ngram, min_ngram: number of last tokens that have to match, as many as possible.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, max_draft: int = 15, max_ngram: int = 4, min_ngram: int = 2) -> None:
        if max_draft < 1:
            raise ValueError(f"prompt lookup needs at least 1 draft token at a time, got {max_draft}")
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram must be in 1..max_ngram, got min_ngram={min_ngram}, max_ngram={max_ngram}")
        self.max_draft = max_draft
        self.sizes = range(max_ngram, min_ngram - 1, -1)
        self._indexes: WeakKeyDictionary[Sequence, _Index] = WeakKeyDictionary()

    def draft(self, sequences: abc.Sequence[Sequence], limits: abc.Sequence[int]) -> list[Draft]:
        """See `Drafter.draft`; all draft tokens are certain."""
        return [Draft(self._look_up(one, limit)) for one, limit in zip(sequences, limits, strict=True)]

    def _look_up(self, sequence: Sequence, limit: int) -> list[int]:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = _Index(self.sizes, min(self.max_draft, FIRST_DRAFT))
        index.count = min(self.max_draft, index.next_count(sequence.tokens))
        index.draft = index.continuation(sequence.tokens, min(index.count, limit))
        return index.draft


class _Index:
    """Index of the n-grams of one growing text: where each occurred last, by the place of its next token.

    Args:
        sizes: values of n, longest first.
        count: initial draft length.
    """

    def __init__(self, sizes: abc.Sequence[int], count: int) -> None:
        self.sizes = sizes
        self.count = count
        self.draft: list[int] = []  # the last one, which followed the indexed part
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> place of its next token
        self._indexed = 0  # n-grams that end before this place are in the index

    def next_count(self, tokens: abc.Sequence[int]) -> int:
        """Next draft length, from the number of draft tokens that were accepted last."""
        if not self.draft:
            return self.count
        return max(FIRST_DRAFT, 2 * _common_length(self.draft, tokens[self._indexed + 1 :]))

    def continuation(self, tokens: abc.Sequence[int], count: int) -> list[int]:
        """Index the new ones of `tokens`; then the continuation of their last n-gram's previous occurrence, or []."""
        for place in range(self._indexed + 1, len(tokens)):
            for size in self.sizes:
                if size <= place:
                    self._next[tuple(tokens[place - size : place])] = place
        self._indexed = len(tokens) - 1
        place = next((p for n in self.sizes if (p := self._next.get(tuple(tokens[-n:]))) is not None), None)
        if place is None:
            return []
        period = len(tokens) - place  # a copy beyond the end of the text repeats itself
        return [tokens[place + i % period] for i in range(count)]


class DraftModel:
    """Drafts with a smaller model of the same vocabulary.

    Its caches follow the sequences: they are rewound to before rejected tokens, and rows join and leave with those of the
    batch. There is no draft for a sequence that is too long for the draft model, or has tokens that it does not know.

    Args:
        model: in evaluation mode. The drafter has its own caches.
        vocabulary: size of the distributions: `padded_vocab_size` of the model that verifies.
        count: draft tokens at a time.
        prompt_chunksize: most tokens of a prefill call (None: as many as the caches take).

    Raises:
        ValueError: if `count` is not positive.
    """

    def __init__(self, model: GPT, vocabulary: int, count: int = 3, prompt_chunksize: int | None = None) -> None:
        if count < 1:
            raise ValueError(f"a draft model needs at least 1 draft token at a time, got {count}")
        self.model = model
        self._lease = CacheLease(model, LayerCaches())
        self.vocabulary = vocabulary
        self.count = count
        self.prompt_chunksize = prompt_chunksize
        self._rows: list[_DraftRow] = []  # by row of the caches

    @torch.inference_mode()
    def draft(self, sequences: abc.Sequence[Sequence], limits: abc.Sequence[int]) -> list[Draft]:
        """See `Drafter.draft`; with greedy sampling, draft tokens are certain."""
        drafts = {sequence: Draft([]) for sequence in sequences}
        limit = {
            sequence: limit
            for sequence, limit in zip(sequences, limits, strict=True)
            if self._knows_tokens_of(sequence)
        }
        if limit:
            count = min(self.count, max(limit.values()))
            longest = max(len(sequence.tokens) for sequence in limit) + count
            if longest <= self.model.max_seq_length:
                drafts |= self._lease.run(self._draft, limit, count, longest)
        return [drafts[sequence] for sequence in sequences]

    def _knows_tokens_of(self, sequence: Sequence) -> bool:
        """Whether all tokens have a row in the draft model's embedding; cached ones were checked before."""
        row = next((row for row in self._rows if row.sequence is sequence), None)
        start = 0 if row is None else row.n_verified
        return max(sequence.tokens[start:], default=0) < self.model.config.padded_vocab_size

    def _draft(self, limit: dict[Sequence, int], count: int, longest: int) -> dict[Sequence, Draft]:
        self._follow(list(limit), longest)
        rows = self._rows
        n_run = max(row.n_behind for row in rows)  # 2 if all draft tokens of some row were accepted, else 1
        self.model.caches.rewind([row.n_cached - (len(row.sequence.tokens) - n_run) for row in rows])
        count = min(count, self.model.caches.max_rewindable_tokens(self.model.max_seq_length))
        inputs = [row.sequence.tokens[-n_run:] for row in rows]
        drawn: dict[Sequence, tuple[list[int], list[torch.Tensor]]] = {sequence: ([], []) for sequence in limit}
        for row in rows:
            row.n_verified, row.draft = len(row.sequence.tokens), []
        for i in range(count):
            idx = torch.tensor(inputs, device=self.model.device)
            logits = self.model(idx, self.model.next_token_pos, last_token_only=True)[:, -1, : self.vocabulary]
            logits = pad(logits, (0, self.vocabulary - logits.shape[-1]), value=-torch.inf)
            for row, row_logits in zip(rows, logits, strict=True):
                if i < limit[row.sequence]:
                    draw_draft_token(row.sequence, row_logits, *drawn[row.sequence])
                row.draft.append(drawn[row.sequence][0][-1])
            inputs = [row.draft[-1:] for row in rows]
        for row in rows:
            row.draft.pop()  # is not in the caches
        return {one: Draft(tokens, torch.stack(q) if q else None) for one, (tokens, q) in drawn.items()}

    def _follow(self, sequences: abc.Sequence[Sequence], length: int) -> None:
        """Give each of the sequences a row of the caches with room for `length` tokens."""
        prepare_caches(self.model, len(sequences), length, roomy=True)
        if self.model.next_token_pos == 0:  # new caches, or emptied ones
            self._rows = []
        drafted, before = set(sequences), self._rows
        kept = [i for i, row in enumerate(before) if row.sequence in drafted and row.n_behind <= 2]
        self._rows = [before[i] for i in kept]
        followed = {row.sequence for row in self._rows}
        new = [_DraftRow(one, len(one.tokens) - 1) for one in sequences if one not in followed]
        if kept and len(kept) < len(before):
            self.model.caches.reorder(kept)
        if kept and new:
            self.model.caches.extend(len(new))
        if new:
            device = self.model.device
            prompts = [torch.tensor(row.sequence.tokens[:-1], device=device) for row in new]
            places = range(len(kept), len(kept) + len(new)) if kept else None
            prefill(self.model, prompts, self.prompt_chunksize, rows=places)
            self._rows += new


def draw_draft_token(
    sequence: Sequence, logits: torch.Tensor, draft_tokens: list[int], distributions: list[torch.Tensor]
) -> None:
    """Draw a draft token from logits (V,) and add it to `draft_tokens`, and its distribution to `distributions`. Greedy draft
    tokens are certain and have no distribution."""
    sampling = replace(sequence.sampling, processors=())  # those may have state, and must see accepted tokens only
    adjusted = sampling.adjust(logits, [*sequence.tokens, *draft_tokens], sequence.prompt_length)
    if sampling.is_greedy:
        draft_tokens += check_tokens(likeliest(adjusted[None]).tolist())
    else:
        distributions.append(probabilities(adjusted[None], sampling)[0])
        draft_tokens.append(draw_from(distributions[-1], sequence))


@dataclass(eq=False)
class _DraftRow:
    """A row of the draft model's caches: the first `n_verified` tokens of `sequence`, then `draft`."""

    sequence: Sequence
    n_verified: int
    draft: list[int] = field(default_factory=list)

    @property
    def n_cached(self) -> int:
        return self.n_verified + len(self.draft)

    @property
    def n_behind(self) -> int:
        """Number of tokens still to be run: all after the accepted ones, and at least the last."""
        new = self.sequence.tokens[self.n_verified :]
        return len(new) - min(_common_length(self.draft, new), len(new) - 1)


def _common_length(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
