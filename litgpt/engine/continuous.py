"""Continuous batching: sequences wait, join and leave between steps, on caches that are made once."""

from collections import deque

from litgpt.engine.caches import CacheLease, check_caches, prepare_caches
from litgpt.engine.drafting import Drafter
from litgpt.engine.engine import Engine, Released
from litgpt.engine.sequence import Sequence
from litgpt.model import GPT


class ContinuousBatch:
    """A queue before an engine: what a server, or a long list of prompts, is answered with.

    Sequences wait for a free row in the order in which they came; a row is free as soon as its sequence is finished. The
    output of each is that of its own batch of one. Others may use the model between steps; but let one thread `submit` and
    `step`.

    Args:
        model: in evaluation mode. Caches that were assigned are used; otherwise default ones are made, once.
        batch_size: most sequences at a time. In a compiled model every step has that many rows, some of them idle.
        cache_length: tokens of a sequence, prompt and answer, that default caches are made for (default: the model's
            context).
        prompt_chunksize: most tokens of a call in the prefill (None: as many as the caches take, or 256 where others wait
            for it).
        drafter: drafts the next tokens.
        lease: the caches (None: those above).

    Raises:
        ValueError: if that is more than the model or its caches take.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        cache_length: int | None = None,
        prompt_chunksize: int | None = None,
        drafter: Drafter | None = None,
        lease: CacheLease | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        lease = CacheLease.take(model) if lease is None else lease
        self.engine = Engine(model, prompt_chunksize, drafter, batch_size if model.static_shapes else None, lease)
        self.model = model
        self.batch_size = batch_size
        self.waiting: deque[Sequence] = deque()
        try:
            lease.run(self._make_caches, cache_length)
        except BaseException:
            lease.release()
            raise

    def _make_caches(self, cache_length: int | None) -> None:
        if not self.model.kv_caches() or self.model.caches.default:
            length = self.model.max_seq_length if cache_length is None else cache_length
            prepare_caches(self.model, self.batch_size, length)
        else:
            check_caches(self.model, self.batch_size, cache_length or 1)

    @property
    def unfinished(self) -> int:
        """Sequences that wait or are active."""
        return len(self.waiting) + len(self.engine.active)

    def submit(self, sequence: Sequence) -> None:
        """Let a sequence wait for a row.

        Raises:
            ValueError: if it will never fit. The others are not disturbed.
        """
        self.engine.check([sequence])
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence that waits or is active; no more tokens come of it."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            sequence.finish_reason = "cancelled"
        else:
            self.engine.cancel(sequence)

    def step(self) -> Released:
        """Let waiting sequences join, and go one step on: sequences, and their tokens that are now known to be output.

        While others are active, prompts go through the model chunk by chunk, so that a long one does not hold up the others'
        next tokens. The list is empty when nothing is left to do. A sequence is finished when it has a `finish_reason`.
        """
        joining: list[Sequence] = []
        free = self.batch_size - len(self.engine.active)
        while self.waiting and len(joining) < free and self.engine.can_join(self.waiting[0], joining):
            joining.append(self.waiting.popleft())
        if joining:
            self.engine.add(joining, chunked=bool(self.engine.active))
        return self.engine.step()

    def run(self) -> None:
        """Go on until all sequences are finished."""
        self.engine.lease.run(self._run)

    def _run(self) -> None:
        while self.unfinished:
            self.step()

    def close(self) -> None:
        """Give default caches back to the model, where the next call finds them."""
        self.engine.lease.release()
