"""Prefill of prompts, in as few calls as possible or chunk by chunk beside sequences that are decoded."""

from collections import abc, defaultdict
from itertools import accumulate

import torch

from litgpt.engine.second_reading import check_alone, is_read_twice, read_twice
from litgpt.engine.sequence import Sequence
from litgpt.model import GPT

PACKED_TOKENS = 1024  # most tokens of a call with several prompts
CHUNK_TOKENS = 256  # and of a call beside sequences that are decoded, which wait for it


@torch.inference_mode()
def prefill(
    model: GPT,
    prompts: abc.Sequence[torch.Tensor],
    chunksize: int | None = None,
    start: int = 0,
    rows: abc.Sequence[int] | None = None,
) -> torch.Tensor:
    """Run prompts through the model, each in as few calls as the caches take.

    Args:
        model: with caches for as many rows as there are prompts.
        prompts: B tensors of tokens (T_b,), at least one each. A tensor that occurs several times is run once; several short
            prompts share a call.
        chunksize: most tokens of a call (None: as many as the caches take).
        start: number of tokens of every row that are cached already; 0 begins new sequences.
        rows: rows in use for the prompts (None: they are the batch).

    Returns:
        Logits (B, V) of the last tokens.
    """
    into = list(range(len(prompts))) if rows is None else list(rows)
    firsts: dict[int, int] = {}  # by tensor, the first prompt that has it
    first_of = [firsts.setdefault(id(prompt), i) if start == 0 else i for i, prompt in enumerate(prompts)]
    run = sorted(set(first_of))
    if rows is None and len({len(prompts[i]) for i in run}) == 1:  # in one call, of the whole batch
        last = dict(zip(run, _prefill_rows(model, [prompts[i] for i in run], chunksize, start, None), strict=True))
        copies = [run.index(i) for i in first_of]
    else:
        if rows is None and start == 0:
            model.caches.start(len(prompts))
        last = {}
        for members in _calls(model, {i: len(prompts[i]) for i in run}, chunksize, start):
            inputs, places = [prompts[i] for i in members], [into[i] for i in members]
            if len(set(map(len, inputs))) == 1:
                logits = _prefill_rows(model, inputs, chunksize, start, places)
            else:
                sizes = list(map(len, inputs))
                logits = model(torch.cat(inputs)[None], start, last_token_only=True, rows=places, row_sizes=sizes)[
                    :, -1
                ]
            last.update(zip(members, logits, strict=True))
        copies = list(range(len(model.caches.row_lengths)))
        for i, row in enumerate(into):
            copies[row] = into[first_of[i]]
    if len(run) < len(prompts):
        model.caches.reorder(copies)
    return torch.stack([last[i] for i in first_of])


def _calls(model: GPT, lengths: dict[int, int], chunksize: int | None, start: int) -> list[list[int]]:
    """Groups of prompts (given by length) for one call each: several short ones, or long ones of the same length."""
    limit = model.kv_cache_max_prefill_length() if start == 0 else model.kv_cache_max_tokens_forward()
    most = min(x for x in (PACKED_TOKENS, chunksize, limit) if x is not None)
    alike: dict[int, list[int]] = defaultdict(list)
    for i, length in lengths.items():
        alike[length].append(i)
    calls: list[list[int]] = []
    room = 0
    for length, members in sorted(alike.items()):
        if length > most:
            calls.append(members)
            continue
        for i in members:
            if length > room:
                calls.append([])
                room = PACKED_TOKENS if chunksize is None else min(chunksize, PACKED_TOKENS)
            calls[-1].append(i)
            room -= length
    return calls


def _prefill_rows(
    model: GPT, prompts: abc.Sequence[torch.Tensor], chunksize: int | None, start: int, rows: list[int] | None
) -> torch.Tensor:
    """Prefill prompts of one length into `rows`; logits (B, V)."""
    idx = torch.stack(list(prompts))
    if start == 0 and is_read_twice(model, idx.shape[1]):
        check_alone(model, idx.shape[1], len(model.caches.row_lengths) if rows else len(prompts))
        return read_twice(model, idx[0], lambda: _run_rows(model, idx, chunksize, 0, None))
    return _run_rows(model, idx, chunksize, start, rows)


def _run_rows(model: GPT, idx: torch.Tensor, chunksize: int | None, start: int, rows: list[int] | None) -> torch.Tensor:
    """Run tokens (B, T) through the model; logits (B, V)."""
    T, done = idx.shape[1], 0
    while True:
        size = uninterrupted_size(model, T - done, chunksize, start + done, rows)
        chunk = idx[:, done : done + size]
        if done + size == T:
            return model(chunk, start + done, last_token_only=True, rows=rows)[:, -1]
        model(chunk, start + done, skip_lm_head=True, last_token_only=True, rows=rows)
        done += size


def call_size(model: GPT, left: int, chunksize: int | None, done: int) -> int:
    """Number of tokens of the next call for a prompt with `done` cached and `left` remaining tokens."""
    limit = model.kv_cache_max_tokens_forward() if done else model.kv_cache_max_prefill_length()
    return min(x for x in (left, chunksize, limit, model.max_seq_length) if x is not None)


def uninterrupted_size(
    model: GPT, left: int, chunksize: int | None, done: int, rows: abc.Sequence[int] | None = None
) -> int:
    """`call_size` for `rows` (None: all) that ends where a cache evicts by score, if the layer runner runs no call beyond that."""
    size, runner = call_size(model, left, chunksize, done), model.layer_runner
    ends = done and runner is not None and not model.static_shapes and not runner.runs_evictions(model.kv_caches())
    limit = model.caches.uninterrupted_tokens(rows) if ends else None
    return size if limit is None else min(size, limit)


class ChunkedPrefill:
    """Prompts that are prefilled chunk by chunk while other sequences are decoded.

    Args:
        model: with caches.
        chunksize: most tokens of a prefill step (None: `CHUNK_TOKENS`).
    """

    def __init__(self, model: GPT, chunksize: int | None) -> None:
        self.model = model
        self.chunksize = chunksize
        self.at_checkpoint: list[Sequence] = []  # whose last chunk ended at a checkpoint
        self._groups: list[list[Sequence]] = []  # that share a prompt; it is prefilled into the first one's row

    @property
    def unfinished(self) -> bool:
        """Whether prompts are still to be prefilled."""
        return bool(self._groups)

    def add(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add sequences with empty rows."""
        alike: dict[int, list[Sequence]] = defaultdict(list)
        for sequence in sequences:
            alike[id(sequence.prompt)].append(sequence)
        self._groups += alike.values()

    def cancel(self, sequence: Sequence, rows: list[Sequence | None]) -> None:
        """Remove a sequence. If others share its prompt, one of them takes its row."""
        for group in self._groups:
            if sequence in group:
                group.remove(sequence)
                if group and sequence.n_prefilled > group[0].n_prefilled:
                    i, j = rows.index(sequence), rows.index(group[0])
                    rows[i], rows[j] = rows[j], rows[i]
                    group[0].n_prefilled, sequence.n_prefilled = sequence.n_prefilled, 0
        self._groups = [group for group in self._groups if group]

    def clear(self) -> None:
        """Forget all sequences."""
        self._groups = []

    def step(self, rows: list[Sequence | None]) -> tuple[list[Sequence], torch.Tensor | None]:
        """Run the next chunks. Returns the sequences whose prefill is complete, and their logits (n, V).

        Where outputs depend on how a prompt is cut into calls, its first call is the one that a batch of one would make.
        """
        chunks = self._chunks()
        places = [rows.index(group[0]) for group, _ in chunks]
        notes = any(one.logprobs_of_prompt for group, _ in chunks for one in group)
        logits = self.model(
            torch.cat([tokens for _, tokens in chunks])[None],
            max(group[0].n_prefilled for group, _ in chunks),
            skip_lm_head=notes,
            last_token_only=not notes,
            rows=places,
            row_sizes=[len(tokens) for _, tokens in chunks],
        )
        logits = self._note_prompts(chunks, logits[0]) if notes else logits[:, -1]
        copies, done, logits_of = list(range(len(rows))), [], []
        self.at_checkpoint = []
        for at, (group, tokens) in enumerate(chunks):
            group[0].n_prefilled += len(tokens)
            if group[0].n_prefilled in self._checkpoints(group[0]):
                self.at_checkpoint.append(group[0])
            if group[0].n_prefilled == group[0].prompt_length:
                for sequence in group:
                    copies[rows.index(sequence)] = places[at]
                    sequence.n_prefilled = sequence.prompt_length
                done += group
                logits_of += [at] * len(group)
        if not done:
            return [], None
        self._groups = [group for group in self._groups if group[0].n_prefilled < group[0].prompt_length]
        if len(done) > len(set(logits_of)):
            self.model.caches.reorder(copies)
        return done, logits[logits_of]

    def _note_prompts(self, chunks: abc.Sequence[tuple[list[Sequence], torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        """Give sequences the log-probabilities of their prompts' tokens, from the model's output (n, E) for chunks. Logits (B, V)
        of the chunks' last tokens."""
        ends = list(accumulate(len(tokens) for _, tokens in chunks))
        for (group, tokens), end in zip(chunks, ends, strict=True):
            is_last = group[0].n_prefilled + len(tokens) == group[0].prompt_length
            for at in range(end - len(tokens), end - is_last, CHUNK_TOKENS):
                if noting := [one for one in group if one.logprobs_of_prompt]:
                    logits = self.model.logits(x[at : min(at + CHUNK_TOKENS, end - is_last)])
                    for one in noting:
                        one.note_prompt(logits)
        return self.model.logits(x[[end - 1 for end in ends]])

    def _chunks(self) -> list[tuple[list[Sequence], torch.Tensor]]:
        """The groups of the next step, and the tokens of each."""
        room = self.chunksize or CHUNK_TOKENS
        chunks: list[tuple[list[Sequence], torch.Tensor]] = []
        for group in self._groups:
            first = group[0]
            size = call_size(self.model, first.prompt_length - first.n_prefilled, self.chunksize, first.n_prefilled)
            if not first.n_prefilled and not self.model.caches.is_chunk_invariant(first.prompt_length):
                if chunks and size > room:
                    break
                room = max(room, size)
            end = first.n_prefilled + min(size, room)
            end = min([at for at in self._checkpoints(first) if at > first.n_prefilled] + [end])
            tokens = first.prompt[first.n_prefilled : end]
            chunks.append((group, tokens))
            room -= len(tokens)
            if not room:
                break
        return chunks

    def _checkpoints(self, sequence: Sequence) -> list[int]:
        """Numbers of a prompt's first tokens that its caches will not be rewound to once it is complete: its checkpoints, and
        all of it."""
        if not any(cache.evicts and cache.cache_length < sequence.max_length for cache in self.model.kv_caches()):
            return []
        return [at for at in sequence.checkpoints if 0 < at < sequence.prompt_length] + [sequence.prompt_length]
