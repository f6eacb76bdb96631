"""Where guesses of the next tokens come from: the text so far, or a smaller model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad

from litgpt.engine.engine import Guesses, prefill, prepare_caches
from litgpt.engine.sampling import Draws, likeliest, probabilities
from litgpt.engine.verification import draw_from
from litgpt.model import GPT

LEAST_GUESSES = 3  # of a prompt lookup: a call of four tokens takes hardly longer than one of two


class PromptLookup:
    """Guesses that the text goes on as it did where its last tokens stood before, in the prompt or in the output.

    Needs no model, and pays where the output repeats what is there: editing, quoting, code, lists. A lookup takes the same
    time whatever the length of the text. Of guesses that failed fewer follow, of those that all stood twice as many.

    Args:
        most: guesses at a time.
        longest, shortest: how many of the last tokens have to be found again, as many as possible.

    Raises:
        ValueError: for numbers that mean nothing.
    """

    def __init__(self, most: int = 15, longest: int = 4, shortest: int = 2) -> None:
        if most < 1:
            raise ValueError(f"prompt lookup needs at least 1 guess at a time, got {most}")
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must be in 1..longest, got shortest={shortest}, longest={longest}")
        self.most = most
        self.sizes = range(longest, shortest - 1, -1)
        self._texts: WeakKeyDictionary[Draws, _Text] = WeakKeyDictionary()

    def propose(self, rows: Sequence[Draws], limits: Sequence[int]) -> list[Guesses]:
        """As `Proposer.propose`; all guesses are certain."""
        return [(self._guess(row, limit), None) for row, limit in zip(rows, limits, strict=True)]

    def _guess(self, row: Draws, limit: int) -> list[int]:
        text = self._texts.get(row)
        if text is None:
            text = self._texts[row] = _Text(self.sizes, min(self.most, LEAST_GUESSES))
        text.count = min(self.most, text.next_count(row.tokens))
        text.guesses = text.continuation(row.tokens, min(text.count, limit))
        return text.guesses


class _Text:
    """Index of the places where the n-grams of one growing text go on.

    Args:
        sizes: n, longest first.
        count: guesses at first.
    """

    def __init__(self, sizes: Sequence[int], count: int) -> None:
        self.sizes = sizes
        self.count = count
        self.guesses: list[int] = []  # the last ones, for the place where the indexed part ended
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token that followed it last
        self._indexed = 0  # n-grams that end before this place, and so have a following token, are in

    def next_count(self, tokens: Sequence[int]) -> int:
        """How many guesses to make, by how many of the last ones stood."""
        if not self.guesses:
            return self.count
        return max(LEAST_GUESSES, 2 * _common(self.guesses, tokens[self._indexed + 1 :]))

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed when `tokens`, of which new ones are indexed first, last ended as now; [] if they never did."""
        for place in range(self._indexed + 1, len(tokens)):
            for size in self.sizes:
                if size <= place:
                    self._next[tuple(tokens[place - size : place])] = place
        self._indexed = len(tokens) - 1
        place = next((p for n in self.sizes if (p := self._next.get(tuple(tokens[-n:]))) is not None), None)
        if place is None:
            return []
        period = len(tokens) - place  # a copy that overtakes the end of the text goes on with what it copied
        return [tokens[place + i % period] for i in range(count)]


class DraftModel:
    """Guesses what a smaller model says that has the same vocabulary.

    Its caches follow the rows: they are rewound to where guesses failed, and rows join and leave with those of the batch.
    Where a sequence has become too long for the draft model, nothing is guessed.

    Args:
        model: in evaluation mode. It gets caches of its own.
        vocabulary: tokens that the guesses' distributions are to cover: `padded_vocab_size` of the model they are for.
        count: guesses at a time.
        prompt_chunksize: most tokens of a call in the prefill (None: as many as the caches take).

    Raises:
        ValueError: if `count` is not positive.
    """

    def __init__(self, model: GPT, vocabulary: int, count: int = 3, prompt_chunksize: int | None = None) -> None:
        if count < 1:
            raise ValueError(f"a draft model needs at least 1 guess at a time, got {count}")
        model.clear_kv_caches(assigned=True)
        self.model = model
        self.vocabulary = vocabulary
        self.count = count
        self.prompt_chunksize = prompt_chunksize
        self._followers: list[_Follower] = []  # by row of the caches

    @torch.inference_mode()
    def propose(self, rows: Sequence[Draws], limits: Sequence[int]) -> list[Guesses]:
        """As `Proposer.propose`; guesses of rows with greedy sampling are certain."""
        longest = max(len(row.tokens) for row in rows) + min(self.count, max(limits))
        if longest > self.model.max_seq_length:
            return [((), None)] * len(rows)
        self._follow(rows, longest)
        followers, limit = self._followers, dict(zip(rows, limits, strict=True))
        fed = max(follower.behind for follower in followers)  # 2 if all guesses of some row stood, else 1
        self.model.rewind_kv_caches([f.held - (len(f.row.tokens) - fed) for f in followers])
        count = min(self.count, max(limits), self.model.kv_cache_max_rewindable_tokens())
        inputs = [follower.row.tokens[-fed:] for follower in followers]
        guesses: dict[Draws, tuple[list[int], list[torch.Tensor]]] = {row: ([], []) for row in rows}
        for follower in followers:
            follower.agreed, follower.guesses = len(follower.row.tokens), []
        for i in range(count):
            for follower, logits in zip(followers, self._logits(inputs), strict=True):
                if i < limit[follower.row]:
                    guess(follower.row, logits, *guesses[follower.row])
                follower.guesses.append(guesses[follower.row][0][-1])
            inputs = [follower.guesses[-1:] for follower in followers]
        for follower in followers:
            follower.guesses.pop()  # was not run
        return [(tokens, torch.stack(q) if q else None) for tokens, q in (guesses[row] for row in rows)]

    def _logits(self, inputs: list[list[int]]) -> torch.Tensor:
        """Run tokens (B, T); logits (B, V) of what follows, V as in the model that the guesses are for."""
        idx = torch.tensor(inputs, device=self.model.transformer.wte.weight.device)
        logits = self.model(idx, self.model.next_token_pos, last_token_only=True)[:, -1, : self.vocabulary]
        return pad(logits, (0, self.vocabulary - logits.shape[-1]), value=-torch.inf)

    def _follow(self, rows: Sequence[Draws], length: int) -> None:
        """Have a row of the caches for each of `rows`, and room for `length` tokens in it."""
        prepare_caches(self.model, len(rows), length, roomy=True)
        if self.model.next_token_pos == 0:  # new caches
            self._followers = []
        wanted, before = set(rows), self._followers
        kept = [i for i, follower in enumerate(before) if follower.row in wanted and follower.behind <= 2]
        self._followers = [before[i] for i in kept]
        held = {follower.row for follower in self._followers}
        new = [_Follower(row, len(row.tokens) - 1) for row in rows if row not in held]
        if kept and len(kept) < len(before):
            self.model.reorder_kv_caches(kept)
        if kept and new:
            self.model.extend_kv_caches(len(new))
        if new:
            device = self.model.transformer.wte.weight.device
            prompts = [torch.tensor(follower.row.tokens[:-1], device=device) for follower in new]
            places = range(len(kept), len(kept) + len(new)) if kept else None
            prefill(self.model, prompts, self.prompt_chunksize, rows=places)
            self._followers += new


def guess(row: Draws, logits: torch.Tensor, guesses: list[int], distributions: list[torch.Tensor]) -> None:
    """Add to the guesses of a row's next tokens one drawn from logits (V,), and to their distributions the one that it was
    drawn from; with greedy sampling guesses are certain, and have none."""
    sampling = replace(row.sampling, processors=())  # they may keep state, and are to see tokens that stand
    adjusted = sampling.adjust(logits, [*row.tokens, *guesses], row.prompt_length)
    if sampling.is_greedy:
        guesses.append(int(likeliest(adjusted[None])))
    else:
        distributions.append(probabilities(adjusted[None], sampling)[0])
        guesses.append(draw_from(distributions[-1], row))


@dataclass(eq=False)
class _Follower:
    """What a row of the draft model's caches holds: the first `agreed` tokens of `row`, and after them `guesses`."""

    row: Draws
    agreed: int
    guesses: list[int] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.agreed + len(self.guesses)

    @property
    def behind(self) -> int:
        """Tokens of the row that have to be run: those after the guesses that stood, and in any case the last one."""
        new = self.row.tokens[self.agreed :]
        return len(new) - min(_common(self.guesses, new), len(new) - 1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
