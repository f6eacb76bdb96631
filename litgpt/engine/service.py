"""One thread that runs models for any number of threads: requests come in, texts go out."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.engine.text_stream import TextStream
from litgpt.errors import describe
from litgpt.tokenizer import Tokenizer


@dataclass(eq=False)
class Generation:
    """A request for one answer.

    Args:
        model: name of the model.
        prompt: tokens.
        max_new_tokens, sampling, stop_tokens, logprobs, checkpoints, wants_state, logprobs_of_prompt: as for `Sequence`.
        stops: texts that end the answer.
        deliver: called by the engine's thread with the generation and a piece of text, whenever there is one, and once at the
            end, when `finish_reason` is set. It must not block.

    Attributes:
        finish_reason: "stop", "length", "cancelled", "error", or None: not finished.
        error: what went wrong, if `finish_reason` is "error".
        sequence: once it was queued.
    """

    model: str
    prompt: torch.Tensor
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: tuple[list[int], ...] = ()
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    checkpoints: tuple[int, ...] = ()
    wants_state: bool = False
    logprobs_of_prompt: bool = False
    deliver: Callable[["Generation", str], None] = lambda generation, text: None
    finish_reason: str | None = field(default=None, init=False)
    error: str | None = field(default=None, init=False)
    sequence: Sequence | None = field(default=None, init=False)
    text: TextStream | None = field(default=None, init=False)

    @property
    def has_begun(self) -> bool:
        """Whether the engine has read a part of the prompt."""
        return self.sequence is not None and (self.sequence.n_prefilled > 0 or self.sequence.is_decoding)


class Service:
    """The thread that owns the models' batches.

    Args:
        batches: by the models' names, with the tokenizer of each.

    Attributes:
        heartbeat: `time.monotonic()` of the last step, or of the last look for one.
    """

    def __init__(self, batches: dict[str, tuple[ContinuousBatch, Tokenizer]]) -> None:
        self.batches = batches
        self.heartbeat = time.monotonic()
        self.n_failures = 0
        self.n_generated = 0
        self._inbox: deque[tuple[str, Any]] = deque()
        self._wake = threading.Event()
        self._running: dict[Sequence, Generation] = {}
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- for any thread

    @property
    def alive(self) -> bool:
        """Whether the thread takes requests: not any more when the first of them is told that it has stopped."""
        return self._thread.is_alive() and not self._ended

    @property
    def waiting(self) -> int:
        """Number of requests without a row."""
        return len(self._inbox) + sum(len(batch.waiting) for batch, _ in self.batches.values())

    @property
    def unfinished(self) -> int:
        """Number of requests that wait or run."""
        return len(self._inbox) + len(self._running)

    def submit(self, generation: Generation) -> None:
        self._send("submit", generation)

    def cancel(self, generation: Generation) -> None:
        """End a request, if it has not ended; its row is free within one step."""
        self._send("cancel", generation)

    def cut(self, generation: Generation) -> None:
        """End a request with what it has, as if that were all the tokens that it may have."""
        self._send("cut", generation)

    def fail_all(self, message: str) -> None:
        """End all requests with an error."""
        self._send("fail", message)

    def call(self, function: Callable[[], None]) -> None:
        """Call a function, which must not raise, in the engine's thread between two steps."""
        self._send("call", function)

    def close(self, timeout: float = 5.0) -> None:
        """End the thread after the current step."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)

    def _send(self, what: str, value: Any) -> None:
        self._inbox.append((what, value))
        self._wake.set()
        if self._ended:
            self._fail_left()

    # -- the thread

    def _run(self) -> None:
        torch.get_num_threads()  # which tells OpenMP in this thread, too, how many torch was told to have
        try:
            self._loop()
        finally:
            self._ended = True
            self._fail_left()

    def _fail_left(self) -> None:
        """End all requests when the thread has ended."""
        for generation in [*self._running.values(), *(one for what, one in list(self._inbox) if what == "submit")]:
            self._end(generation, "error", "the engine has stopped")
        self._running.clear()

    def _loop(self) -> None:
        while not self._closing:
            self.heartbeat = time.monotonic()
            if not self._running and not self._inbox:
                self._wake.wait(1.0)
            self._wake.clear()
            while self._inbox:
                getattr(self, f"_{self._inbox[0][0]}")(self._inbox[0][1])
                self._inbox.popleft()
            for batch, _ in self.batches.values():
                if batch.unfinished:
                    self._step(batch)

    def _submit(self, generation: Generation) -> None:
        if generation.finish_reason:
            return
        batch, tokenizer = self.batches[generation.model]
        try:
            sequence = Sequence(
                generation.prompt.to(batch.model.device),
                generation.max_new_tokens,
                generation.sampling,
                generation.stop_tokens,
                logprobs=generation.logprobs,
                logprobs_of_prompt=generation.logprobs_of_prompt,
                checkpoints=generation.checkpoints,
                wants_state=generation.wants_state,
            )
            batch.submit(sequence)
        except Exception as error:
            self._end(generation, "error", describe(error))
            return
        generation.sequence, generation.text = sequence, TextStream(tokenizer, generation.stops)
        self._running[sequence] = generation

    def _cancel(self, generation: Generation) -> None:
        if generation.finish_reason is None:
            self._drop(generation)
            self._end(generation, "cancelled")

    def _cut(self, generation: Generation) -> None:
        if generation.finish_reason is None:
            self._drop(generation)
            if rest := generation.text.finish():
                self._deliver(generation, rest)
            self._end(generation, "length")

    def _fail(self, message: str) -> None:
        for generation in list(self._running.values()):
            self._drop(generation)
            self._end(generation, "error", message)
        for what, other in list(self._inbox):
            if what == "submit" and other.finish_reason is None:
                self._end(other, "error", message)

    def _call(self, function: Callable[[], None]) -> None:
        function()

    def _drop(self, generation: Generation) -> None:
        """Take a request out of its batch."""
        if generation.sequence is not None:
            self.batches[generation.model][0].cancel(generation.sequence)
            self._running.pop(generation.sequence, None)

    def _step(self, batch: ContinuousBatch) -> None:
        try:
            released = batch.step()
        except Exception as error:  # a failure ends the requests that were in the step, and no other
            self.n_failures += 1
            left, message = {*batch.waiting, *batch.engine.active}, describe(error)
            for sequence, generation in list(self._running.items()):
                if self.batches[generation.model][0] is batch and sequence not in left:
                    del self._running[sequence]
                    self._end(generation, "error", message)
            return
        for sequence, tokens in released:
            if generation := self._running.get(sequence):
                self.n_generated += len(tokens)
                try:
                    self._advance(generation, tokens)
                except Exception as error:
                    self._drop(generation)
                    self._end(generation, "error", describe(error))

    def _advance(self, generation: Generation, tokens: list[int]) -> None:
        sequence, text = generation.sequence, generation.text
        piece = text.push(tokens)
        if text.stopped and not sequence.finish_reason:
            self._drop(generation)
        if text.stopped or sequence.finish_reason:
            piece += text.finish()
        if piece:
            self._deliver(generation, piece)
        if text.stopped or sequence.finish_reason:
            self._running.pop(sequence, None)
            self._end(generation, "stop" if text.stopped else sequence.finish_reason)

    def _end(self, generation: Generation, reason: str, error: str | None = None) -> None:
        if generation.finish_reason is None:
            generation.error, generation.finish_reason = error, reason
            self._deliver(generation, "")

    def _deliver(self, generation: Generation, piece: str) -> None:
        with suppress(Exception):  # of a receiver that is gone
            generation.deliver(generation, piece)
