"""The one loop behind every way to generate: prefill, then decode steps.

A batch of one is a batch. Rows of a ragged batch are prefilled at their own lengths and decoded together; finished sequences
leave the batch, and others may join at any time.
"""

from collections import abc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from litgpt.device_tensor import device_tensor
from litgpt.engine.admission import Rows
from litgpt.engine.caches import CacheLease, check_caches
from litgpt.engine.drafting import Draft, Drafter
from litgpt.engine.drawing import draw
from litgpt.engine.prefill import ChunkedPrefill, prefill
from litgpt.engine.prefixes import KeptPrefix, PrefixStore
from litgpt.engine.sampling import check_tokens
from litgpt.engine.second_reading import check_alone, is_read_twice
from litgpt.engine.sequence import Sequence
from litgpt.engine.verification import verify
from litgpt.model import GPT

T = TypeVar("T")
Released = list[tuple[Sequence, list[int]]]


class Engine:
    """A batch of sequences that are decoded together; they join and leave between steps.

    The output of a sequence does not depend on the others, up to rounding: in float32 it has the tokens of a batch of one; in
    bfloat16 another order of sums may decide a near tie otherwise. (With LongRoPE the longest of the sequences that are
    added to an empty batch decides how positions are rotated.)

    If the model fails or is interrupted, the caches are cleared and active sequences stay unfinished; the engine takes new
    ones.

    Args:
        model: in evaluation mode, with caches.
        prompt_chunksize: most tokens of a prefill call (None: as many as the caches take, or 256 while others are decoded).
        drafter: drafts the next tokens of every sequence; a step may then give several.
        batch_size: fixed number of rows of every step, some of them idle, for compiled code (None: see `Rows`).
        lease: on the caches (None: the model's, see `prepare_caches`, in place while sequences are active).
        prefixes: where the states of rows that finish are kept, from which sequences that are added chunk by chunk begin
            (None: nothing is kept).
    """

    def __init__(
        self,
        model: GPT,
        prompt_chunksize: int | None = None,
        drafter: Drafter | None = None,
        batch_size: int | None = None,
        lease: CacheLease | None = None,
        prefixes: PrefixStore | None = None,
    ) -> None:
        if prompt_chunksize is not None and prompt_chunksize < 1:
            raise ValueError(f"prompt_chunksize must be at least 1 (None: no limit), got {prompt_chunksize}")
        self.model = model
        self.prompt_chunksize = prompt_chunksize
        self.drafter = drafter
        self.lease = CacheLease(model) if lease is None else lease
        self.prefixes = prefixes
        self.n_drafted = self.n_accepted = 0  # draft tokens, and accepted ones
        self._rows = Rows(model, batch_size)
        self._chunked = ChunkedPrefill(model, prompt_chunksize)
        self._first: Released = []  # first tokens, drawn after the prefill
        self._drawn: tuple[list[int], torch.Tensor | None] = ([], None)  # the last ones, of one step
        self._long_rope = False  # whether positions are rotated by LongRoPE's long factors
        self._interrupted = False

    @property
    def acceptance_rate(self) -> float:
        """Fraction of the draft tokens that was accepted (0 if there were none)."""
        return self.n_accepted / max(1, self.n_drafted)

    @property
    def active(self) -> list[Sequence]:
        """Sequences that are not finished."""
        return self._rows.active

    # -- joining and leaving

    def add(self, sequences: abc.Sequence[Sequence], n_cached: int = 0, chunked: bool = False) -> None:
        """Prefill sequences into free rows, and draw the first token of each.

        Args:
            sequences: those with the same prompt tensor share its prefill.
            n_cached: number of first tokens of the prompts that are cached already, if these sequences are the whole batch.
            chunked: leave the prefill to the next steps, a part to each, so that active sequences are decoded meanwhile; prompts
                that are read twice are prefilled at once even so.

        Raises:
            ValueError: if a sequence does not fit, before any work; active ones are not affected.
        """
        self.lease.run(self._add, sequences, n_cached, chunked)

    def _add(self, sequences: abc.Sequence[Sequence], n_cached: int, chunked: bool) -> None:
        if self._interrupted:
            self._empty()
        active = self.active
        self._check(sequences, n_cached)
        if n_cached and active:
            raise ValueError(f"the caches have {n_cached} tokens of no sequence while others are active")
        if n_cached and chunked:
            raise ValueError("prompts that are in the caches in part cannot be added chunk by chunk")
        if not chunked and any(sequence.logprobs_of_prompt for sequence in sequences):
            raise ValueError("log-probabilities of a prompt are noted chunk by chunk only")
        check_caches(self.model, len(active) + len(sequences), 1)
        if not n_cached:
            longest = max(sequence.prompt_length for sequence in sequences)
            check_alone(self.model, longest, len(active) + len({id(one.prompt) for one in sequences}))
        if active:
            self._check_undisturbed()
            if not all(self.can_join(sequence) for sequence in sequences):
                raise ValueError(
                    "with LongRoPE, long and short sequences cannot be in one batch: wait until the others are done"
                )
        self._guarded(self._prefill, sequences, n_cached, chunked)

    @torch.inference_mode()
    def _prefill(self, sequences: abc.Sequence[Sequence], n_cached: int, chunked: bool) -> None:
        rows = None
        self._keep_finished()
        if self.active:
            rows = self._rows.free(len(sequences))
        else:
            self.lease.claim()
            self._rows.sequences = [None] * len(sequences)
            longest = max(sequence.max_length for sequence in sequences)
            self._long_rope = self.model.needs_long_rope(longest)
            if not n_cached:
                self.model.expect_length(longest)
        places = range(len(sequences)) if rows is None else rows
        if chunked:
            if rows is None:
                self.model.caches.start(len(sequences))
            else:
                self._rows.empty(rows)
            self._rows.place(sequences, places)
            self._resume(sequences)
            begins = not sequences[0].n_prefilled
            if not (begins and is_read_twice(self.model, sequences[0].prompt_length)):  # which takes all of a prompt
                self._chunked.add(sequences)
                return
        prompts = {id(sequence.prompt): sequence.prompt[n_cached:] for sequence in sequences}
        prompts = [prompts[id(sequence.prompt)] for sequence in sequences]
        logits = prefill(self.model, prompts, self.prompt_chunksize, n_cached, rows)
        self._rows.place(sequences, places)  # once they are in the caches
        for sequence in sequences:
            sequence.n_prefilled = sequence.prompt_length
        self._note_states(sequences)
        self._first += self._draw(sequences, logits)

    def _resume(self, sequences: abc.Sequence[Sequence]) -> None:
        """Begin sequences in empty rows with what is kept of their prompts."""
        if self.prefixes is None:
            return
        firsts = {id(sequence.prompt): sequence for sequence in reversed(sequences)}  # that share a prompt
        noting = {id(sequence.prompt) for sequence in sequences if sequence.logprobs_of_prompt}
        for sequence in [one for prompt, one in firsts.items() if prompt not in noting]:
            if found := self.prefixes.find(sequence.tokens, self._long_rope):
                kept, n = found
                self.model.caches.load_state_of_row(self._rows.sequences.index(sequence), kept.states, n)
                self.model.caches.long_rope = self._long_rope
                sequence.n_prefilled = sequence.n_reused = n

    def _keep_finished(self) -> None:
        """Keep the states of rows whose sequences have finished."""
        for sequence in self._rows.sequences:
            if sequence is not None and sequence.finish_reason and not sequence.is_kept:
                self._keep(sequence)
                sequence.is_kept = True

    def _keep(self, sequence: Sequence) -> None:
        """Keep the state of a sequence's row."""
        if self.prefixes is None or self.lease.overtaken:
            return
        caches, row = self.model.caches, self._rows.sequences.index(sequence)
        tokens = sequence.tokens[: caches.row_lengths[row]]
        self.prefixes.put(tokens, caches.rewind_limit(row), self._long_rope, lambda: caches.state_of_row(row))

    def _note_states(self, sequences: abc.Sequence[Sequence]) -> None:
        """Give sequences whose prompts are now cached their states, where they ask for it."""
        caches = self.model.caches
        for sequence in sequences:
            if sequence.wants_state:
                row = self._rows.sequences.index(sequence)
                tokens, limit = sequence.tokens[: caches.row_lengths[row]], caches.rewind_limit(row)
                sequence.state = KeptPrefix.of(tokens, limit, self._long_rope, caches.state_of_row(row))

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence without further tokens; its row is free."""
        if sequence in self.active:
            sequence.finish_reason = "cancelled"
            self._first = [(one, output) for one, output in self._first if one is not sequence]
            self._chunked.cancel(sequence, self._rows.sequences)

    def can_join(self, sequence: Sequence, others: abc.Sequence[Sequence] = ()) -> bool:
        """Whether a sequence can be in a batch with the active ones, or with `others` if there are none: with LongRoPE, long
        and short sequences cannot."""
        active = self.active
        if not active and not others:
            return True
        long = self._long_rope if active else self.model.needs_long_rope(others[0].max_length)
        return self.model.needs_long_rope(sequence.max_length) == long

    def check(self, sequences: abc.Sequence[Sequence]) -> None:
        """Raise `ValueError` for sequences that could not be added even if the batch were empty."""
        self.lease.run(self._check, sequences)

    def _check(self, sequences: abc.Sequence[Sequence], n_cached: int = 0) -> None:
        if not sequences:
            raise ValueError("there are no sequences to add")
        if n_cached >= min(sequence.prompt_length for sequence in sequences):
            raise ValueError(f"the caches have {n_cached} tokens of a prompt, which leaves none to run")
        if any(sequence.n_new or sequence.n_prefilled or sequence.finish_reason for sequence in sequences):
            raise ValueError("a sequence can be added only once")
        check_caches(self.model, len(sequences), max(sequence.max_length for sequence in sequences))
        vocabulary = self.model.config.padded_vocab_size
        for sequence in sequences:
            check_vocabulary(sequence.tokens, vocabulary)
            if sequence.logprobs_of_prompt and is_read_twice(self.model, sequence.prompt_length):
                raise ValueError("log-probabilities of a prompt that is read twice are not noted: use another cache")
            for token in sequence.sampling.logit_bias or ():
                if token >= vocabulary:
                    raise ValueError(f"logit_bias for token {token}, but there are {vocabulary}")
            if (sequence.logprobs or 0) > vocabulary:
                raise ValueError(f"logprobs={sequence.logprobs} is more than the {vocabulary} tokens that there are")

    # -- steps

    def step(self) -> Released:
        """Run one step of every active sequence. Returns the tokens that are now known to be output.

        Mostly one a sequence; none while a stop sequence may have begun; several after accepted draft tokens or when a stop
        sequence did not come. The first tokens of added sequences come in a step of their own, unless added in chunks.
        """
        return self.lease.run(self._step)

    def _step(self) -> Released:
        if self._interrupted:
            self._empty()
        if self._first:
            released, self._first = self._first, []
            return released
        if not self.active:
            return []
        self._check_undisturbed()
        return self._guarded(self._run_step)

    def _run_step(self) -> Released:
        released: dict[Sequence, list[int]] = {}
        with torch.inference_mode():  # as a decorator it takes twice as long
            if self._chunked.unfinished:
                sequences, logits = self._chunked.step(self._rows.sequences)
                for sequence in self._chunked.at_checkpoint:
                    self._keep(sequence)
                if sequences:
                    self._note_states(sequences)
                    released.update(self._draw(sequences, logits))
            self._keep_finished()
            self._rows.remove_finished()
            if decoding := self._rows.decoding:
                for sequence, output in self._decode(decoding):
                    released[sequence] = released[sequence] + output if sequence in released else output
        return list(released.items())

    def _decode(self, decoding: list[int]) -> Released:
        """Run the last token and the draft tokens of every row to be decoded, and draw or verify the next ones."""
        rows, prompts_left = self._rows.sequences, self._chunked.unfinished
        drafts = {} if self.drafter is None else self._draft(decoding)
        T = 1 + max((len(draft.tokens) for draft in drafts.values()), default=0)
        # idle rows are run too, for compiled code, but not those whose prompts are being prefilled
        called = decoding if prompts_left else list(range(len(rows)))
        last = [0 if rows[i] is None else rows[i].tokens[-1] for i in called]
        drawn, tokens = self._drawn
        if T > 1:
            inputs = [[x, *(drafts[i].tokens if i in drafts else [])] for i, x in zip(called, last, strict=True)]
            idx = device_tensor([x + [0] * (T - len(x)) for x in inputs], self.model.device)
        elif last == drawn and self.model.layer_devices is None:  # where they were drawn is where they go
            idx = tokens[:, None]
        else:
            idx = device_tensor([[x] for x in last], self.model.device)
        position = self.model.next_token_pos
        if prompts_left:
            lengths = self.model.caches.row_lengths
            position = max(lengths[i] for i in called)
        logits = self.model(idx, position, last_token_only=T == 1, rows=called if prompts_left else None)
        if len(decoding) < len(called):
            logits = logits[decoding]
        sequences = [rows[i] for i in decoding]
        if T == 1:
            released = self._draw(sequences, logits.select(1, -1))
            unused = dict.fromkeys(set(called).difference(decoding), 1)  # tokens to rewind: idle rows stay empty
        else:
            released, unused = [], dict.fromkeys(called, T)
            for i, sequence, x in zip(decoding, sequences, logits, strict=True):
                tokens, distributions = drafts.get(i, Draft([]))
                before = len(sequence.tokens)
                output, n_accepted = verify(sequence, x, tokens, distributions, self.model.broadcast_tokens)
                released.append((sequence, output))
                unused[i] -= len(sequence.tokens) - before
                self.n_drafted += len(tokens)
                self.n_accepted += n_accepted
        if any(unused.values()):
            self.model.caches.rewind([unused.get(i, 0) for i in range(len(rows))])
        return released

    def _draft(self, decoding: list[int]) -> dict[int, Draft]:
        """Drafts by row, no longer than what can be rewound."""
        rows, room = self._rows.sequences, self.model.caches.max_rewindable_tokens(self.model.max_seq_length)
        limits = {i: limit for i in decoding if (limit := min(room, rows[i].n_left - 1)) > 0}
        if not limits:
            return {}
        drafts = self.drafter.draft([rows[i] for i in limits], list(limits.values()))
        return {i: draft for i, draft in zip(limits, drafts, strict=True) if draft.tokens}

    def _draw(self, sequences: abc.Sequence[Sequence], logits: torch.Tensor) -> Released:
        """Draw the next token of each sequence, from logits (B, V)."""
        drawn = draw(logits, sequences)
        own = drawn.tolist()
        self._drawn, tokens = (own, drawn), check_tokens(self.model.broadcast_tokens(own))
        of_rows = logits if any(one.logprobs is not None for one in sequences) else [None] * len(tokens)
        return [(one, one.append(token, x)) for one, token, x in zip(sequences, tokens, of_rows, strict=True)]

    # -- failures

    def _guarded(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(*args)`; after an error or interrupt the batch is empty."""
        self._interrupted = True
        try:
            result = function(*args)
            self._interrupted = False
        except BaseException:
            self._empty()
            raise
        return result

    def _empty(self) -> None:
        self.model.caches.clear()
        self._forget()
        self._interrupted = False

    def _forget(self) -> None:
        self._rows.sequences, self._first = [], []
        self._chunked.clear()

    def _check_undisturbed(self) -> None:
        if self.lease.overtaken:
            self._forget()
            raise ValueError(
                "others have used the model's key-value caches before these sequences were finished: finish one generation "
                "before the next, or give each caches of its own"
            )


def check_vocabulary(tokens: abc.Sequence[int], vocabulary: int) -> None:
    """Raise `ValueError` for tokens outside 0..vocabulary - 1."""
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"the prompt has token {token}, but the model knows 0..{vocabulary - 1}: is the tokenizer another model's?"
            )


def decode(engine: Engine, sequences: abc.Sequence[Sequence], n_cached: int = 0) -> Iterator[list[list[int] | None]]:
    """Prefill sequences into an empty engine, and generate until all are finished.

    Yields:
        For every step, the tokens of each sequence that are now known to be output, or None if it had finished before.
    """
    place = {id(sequence): i for i, sequence in enumerate(sequences)}
    engine.add(sequences, n_cached)
    while step := engine.step():
        released: list[list[int] | None] = [None] * len(sequences)
        for sequence, tokens in step:
            released[place[id(sequence)]] = tokens
        yield released
