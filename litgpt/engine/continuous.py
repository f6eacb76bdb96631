"""Continuous batching: requests wait, join and leave between steps, on caches that are made once."""

from collections import deque

from litgpt.engine.engine import Engine, Proposer, check_caches, prepare_caches
from litgpt.engine.request import Request
from litgpt.model import GPT


class ContinuousBatch:
    """A queue before an engine: what a server, or a long list of prompts, is answered with.

    Requests wait for a free row in the order in which they came; a row is free as soon as its request is finished. The
    output of each is that of its own batch of one. Not for several threads at once: let one thread `submit` and `step`.

    Args:
        model: in evaluation mode. Caches that were assigned are used; otherwise default ones are made, once.
        batch_size: most requests at a time. In a compiled model every step has that many rows, some of them idle.
        cache_length: tokens of a request, prompt and answer, that default caches are made for (default: the model's context).
        prompt_chunksize: most tokens of a call in the prefill (None: as many as the caches take, or 256 where others wait for
            it).
        proposer: guesses the next tokens.

    Raises:
        ValueError: if that is more than the model or its caches take.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        cache_length: int | None = None,
        prompt_chunksize: int | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not model.kv_caches() or model.default_kv_caches:
            prepare_caches(model, batch_size, model.max_seq_length if cache_length is None else cache_length)
        else:
            check_caches(model, batch_size, cache_length or 1)
        self.model = model
        self.batch_size = batch_size
        self.engine = Engine(model, prompt_chunksize, proposer, batch_size if model.static_shapes else None)
        self.waiting: deque[Request] = deque()

    @property
    def unfinished(self) -> int:
        """Requests that wait or are active."""
        return len(self.waiting) + len(self.engine.active)

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            ValueError: if it will never fit. The others are not disturbed.
        """
        self.engine.check([request])
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request that waits or is active; no more tokens come of it."""
        if request in self.waiting:
            self.waiting.remove(request)
            request.finish_reason = "cancelled"
        else:
            self.engine.cancel(request)

    def step(self) -> list[tuple[Request, list[int]]]:
        """Let waiting requests join, and go one step on: requests, and their tokens that are now known to be output.

        While others are active, prompts enter piece by piece, so that a long one does not hold up the others' next tokens.
        The list is empty when nothing is left to do. A request has come to its end when it has a `finish_reason`.
        """
        joining: list[Request] = []
        free = self.batch_size - len(self.engine.active)
        while self.waiting and len(joining) < free and self.engine.can_join(self.waiting[0], joining):
            joining.append(self.waiting.popleft())
        if joining:
            self.engine.add(joining, gradually=bool(self.engine.active))
        return self.engine.step()
