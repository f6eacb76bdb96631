"""Where guesses of the next tokens come from: the text so far, or a smaller model."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from litgpt.generate.engine import Guesses
from litgpt.generate.sampling import Draws

LEAST_GUESSES = 2  # of a prompt lookup: a call of three tokens takes hardly longer than one of a single token


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

    def __init__(self, most: int = 16, longest: int = 4, shortest: int = 2) -> None:
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
            text = self._texts[row] = _Text(self.sizes, min(self.most, 2 * LEAST_GUESSES))
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
        pairs = zip(self.guesses, tokens[self._indexed + 1 :], strict=False)
        stood = next((i for i, (guess, token) in enumerate(pairs) if guess != token), len(self.guesses))
        return max(LEAST_GUESSES, 2 * stood)

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
