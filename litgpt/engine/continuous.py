"""Continuous batching: sequences queue up, and join and leave a batch between steps."""

from collections import deque
from collections.abc import Iterator

import torch

from litgpt.engine.caches import CacheLease, check_caches, prepare_caches
from litgpt.engine.drafting import Drafter
from litgpt.engine.engine import Engine, Released
from litgpt.engine.prefixes import PrefixStore
from litgpt.engine.sequence import Sequence
from litgpt.model import GPT


class ContinuousBatch:
    """A queue in front of an engine, for servers and long lists of prompts.

    Sequences wait for a free row, first come, first served; a row is free as soon as its sequence is finished. Each output is
    that sequence's output in a batch of one. Others may use the model between steps, but only one thread may call `submit`
    and `step`.

    Args:
        model: in evaluation mode. Assigned caches are used; otherwise default ones are made, once.
        batch_size: most sequences at a time. A compiled model always has that many rows, some of them idle.
        cache_length: most tokens of a sequence that default caches are made for (default: the model's context).
        prompt_chunksize: most tokens of a prefill call (None: as many as the caches take, or 256 while others are decoded).
        drafter: drafts the next tokens.
        lease: on the caches (None: as for `model`).
        prefixes: where the states of finished rows are kept, for later prompts that begin with the same tokens. All prompts
            are then prefilled chunk by chunk.

    Raises:
        ValueError: if the model or its caches cannot hold that many rows or tokens.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        cache_length: int | None = None,
        prompt_chunksize: int | None = None,
        drafter: Drafter | None = None,
        lease: CacheLease | None = None,
        prefixes: PrefixStore | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        lease = CacheLease.take(model) if lease is None else lease
        self.engine = Engine(
            model, prompt_chunksize, drafter, batch_size if model.static_shapes else None, lease, prefixes
        )
        self.model = model
        self.batch_size = batch_size
        self.waiting: deque[Sequence] = deque()
        try:
            lease.run(self._make_caches, cache_length)
        except BaseException:
            lease.release()
            raise

    def _make_caches(self, cache_length: int | None) -> None:
        if not self.model.caches.caches or self.model.caches.default:
            length = self.model.max_seq_length if cache_length is None else cache_length
            prepare_caches(self.model, self.batch_size, length)
        else:
            check_caches(self.model, self.batch_size, cache_length or 1)

    @property
    def unfinished(self) -> int:
        """Number of waiting and active sequences."""
        return len(self.waiting) + len(self.engine.active)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            ValueError: if it can never fit; the other sequences are not affected.
        """
        self.engine.check([sequence])
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a waiting or active sequence without further tokens."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            sequence.finish_reason = "cancelled"
        else:
            self.engine.cancel(sequence)

    def step(self) -> Released:
        """Admit waiting sequences and run one step. Returns sequences and the tokens that are now known to be output.

        While others are active, prompts are prefilled chunk by chunk, so that a long one does not delay the others' tokens.
        The list is empty when nothing is left. Finished sequences have a `finish_reason`.
        """
        joining: list[Sequence] = []
        free = self.batch_size - len(self.engine.active)
        while self.waiting and len(joining) < free and self.engine.can_join(self.waiting[0], joining):
            joining.append(self.waiting.popleft())
        if joining:
            notes = any(sequence.logprobs_of_prompt for sequence in joining)
            self.engine.add(joining, chunked=bool(self.engine.active) or self.engine.prefixes is not None or notes)
        return self.engine.step()

    def run(self) -> None:
        """Run steps until all sequences are finished."""
        self.engine.lease.run(self._run)

    def _run(self) -> None:
        while self.unfinished:
            self.step()

    def stream(self, device: torch.device) -> Iterator[torch.Tensor]:
        """Run steps and give their tokens, (n,) each, if one sequence was submitted; closes the batch in the end."""
        try:
            while self.unfinished:
                for _, tokens in self.step():
                    if tokens:
                        yield torch.tensor(tokens, device=device)
        finally:
            self.close()

    def close(self) -> None:
        """Return default caches to the model, for the next call."""
        self.engine.lease.release()
