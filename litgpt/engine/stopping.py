"""When a sequence ends."""

from collections.abc import Sequence


class StopMatcher:
    """Finds stop sequences in the tokens of one sequence, and withholds tokens that may begin one.

    Args:
        stop_tokens: sequences of tokens, each of which ends the sequence.
        include_eos: whether the stop sequence is output.
    """

    def __init__(self, stop_tokens: Sequence[Sequence[int]], include_eos: bool) -> None:
        self.stops = [list(stop) for stop in stop_tokens if len(stop)]
        self.include_eos = include_eos
        self.pending: list[int] = []  # withheld tokens
        self.stopped = False

    def push(self, token: int) -> list[int]:
        """Append a token; return those that are now known to be output. Sets `stopped`."""
        self.pending.append(token)
        for stop in self.stops:
            if self.pending[-len(stop) :] == stop:
                self.stopped = True
                return self._release(len(self.pending) if self.include_eos else len(self.pending) - len(stop))
        undecided = max((_overlap(self.pending, stop) for stop in self.stops), default=0)
        return self._release(len(self.pending) - undecided)

    def flush(self) -> list[int]:
        """Return the withheld tokens, after the last token."""
        return [] if self.stopped else self._release(len(self.pending))

    def _release(self, count: int) -> list[int]:
        released, self.pending = self.pending[:count], self.pending[count:]
        return released


def _overlap(tokens: list[int], stop: list[int]) -> int:
    """Length of the longest suffix of `tokens` that is a proper prefix of `stop`."""
    return next(n for n in range(min(len(tokens), len(stop) - 1), -1, -1) if tokens[len(tokens) - n :] == stop[:n])
