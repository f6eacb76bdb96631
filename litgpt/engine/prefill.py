"""Prefill: how prompts go through the model, all at once or chunk by chunk beside sequences that are decoded."""

from collections import abc, defaultdict

import torch

from litgpt.engine.sequence import Sequence
from litgpt.model import GPT

PACKED_TOKENS = 1024  # most tokens of several prompts that go through the model in one call
CHUNK_TOKENS = 256  # and of prompts beside sequences that are decoded, which wait meanwhile


@torch.inference_mode()
def prefill(
    model: GPT,
    prompts: abc.Sequence[torch.Tensor],
    chunksize: int | None = None,
    start: int = 0,
    rows: abc.Sequence[int] | None = None,
) -> torch.Tensor:
    """Run prompts through the model, each in as few calls as the caches take, and get the last token's logits.

    Args:
        model: with caches for as many rows as there are prompts.
        prompts: B tensors of tokens (T_b,), each of at least one token. One tensor several times over is run once; several
            short ones go through the model in one call.
        chunksize: most tokens of a call (None: as many as the caches take).
        start: tokens that the caches have already for every row; 0 starts anew.
        rows: rows in use that the prompts go to (None: they are the batch).

    Returns:
        Logits (B, V).
    """
    into = list(range(len(prompts))) if rows is None else list(rows)
    firsts: dict[int, int] = {}  # the first one of those that share a tensor runs it
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
            prefill_members = _prefill_rows if len(set(map(len, inputs))) == 1 else _prefill_packed
            last.update(zip(members, prefill_members(model, inputs, chunksize, start, places), strict=True))
        copies = list(range(len(model.kv_caches()[0].row_lengths)))
        for i, row in enumerate(into):
            copies[row] = into[first_of[i]]
    if len(run) < len(prompts):
        model.caches.reorder(copies)
    return torch.stack([last[i] for i in first_of])


def _calls(model: GPT, lengths: dict[int, int], chunksize: int | None, start: int) -> list[list[int]]:
    """Prompts of these lengths, those together that go through the model together: several that are short, or all that have
    the same length and are long."""
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


def _prefill_packed(
    model: GPT, prompts: abc.Sequence[torch.Tensor], chunksize: int | None, start: int, rows: list[int]
) -> torch.Tensor:
    """Prefill prompts of several lengths into `rows` of the caches by one call; logits (B, V)."""
    idx = torch.cat(list(prompts))[None]
    return model(idx, start, last_token_only=True, rows=rows, row_sizes=list(map(len, prompts)))[:, -1]


def _prefill_rows(
    model: GPT, prompts: abc.Sequence[torch.Tensor], chunksize: int | None, start: int, rows: list[int] | None
) -> torch.Tensor:
    """Prefill prompts of one length into `rows` of the caches; logits (B, V)."""
    idx = torch.stack(list(prompts))
    T, done = idx.shape[1], 0
    while True:
        size = _call_size(model, T - done, chunksize, start + done)
        chunk = idx[:, done : done + size]
        if done + size == T:
            return model(chunk, start + done, last_token_only=True, rows=rows)[:, -1]
        model(chunk, start + done, skip_lm_head=True, last_token_only=True, rows=rows)
        done += size


def _call_size(model: GPT, left: int, chunksize: int | None, done: int) -> int:
    """How many of the tokens that are left of a prompt, of which the caches have `done`, go through the model in a call."""
    limit = model.kv_cache_max_tokens_forward() if done else model.kv_cache_max_prefill_length()
    return min(x for x in (left, chunksize, limit, model.max_seq_length) if x is not None)


class ChunkedPrefill:
    """Prompts that go through the model chunk by chunk, so that other sequences are decoded meanwhile.

    Args:
        model: with caches.
        chunksize: most tokens of a prefill step (None: `CHUNK_TOKENS`).
    """

    def __init__(self, model: GPT, chunksize: int | None) -> None:
        self.model = model
        self.chunksize = chunksize
        self._groups: list[list[Sequence]] = []  # those that share a prompt; the first one's row has what is prefilled

    @property
    def unfinished(self) -> bool:
        """Whether there are prompts that are not in the caches yet."""
        return bool(self._groups)

    def add(self, sequences: abc.Sequence[Sequence]) -> None:
        """Let sequences join, whose rows are empty."""
        alike: dict[int, list[Sequence]] = defaultdict(list)
        for sequence in sequences:
            alike[id(sequence.prompt)].append(sequence)
        self._groups += alike.values()

    def cancel(self, sequence: Sequence, rows: list[Sequence | None]) -> None:
        """Let a sequence leave. If others share its prompt, one of them takes over its row of the caches."""
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
        """Run the next tokens of prompts. Returns sequences whose prompts are in the caches now, and logits (n, V).

        Where outputs depend on how a prompt is cut into calls, they do on the first one, which is that of its own run.
        """
        chunks = self._chunks()
        places = [rows.index(group[0]) for group, _ in chunks]
        logits = self.model(
            torch.cat([tokens for _, tokens in chunks])[None],
            max(group[0].n_prefilled for group, _ in chunks),
            last_token_only=True,
            rows=places,
            row_sizes=[len(tokens) for _, tokens in chunks],
        )[:, -1]
        copies, done, logits_of = list(range(len(rows))), [], []
        for at, (group, tokens) in enumerate(chunks):
            group[0].n_prefilled += len(tokens)
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

    def _chunks(self) -> list[tuple[list[Sequence], torch.Tensor]]:
        """The groups, as many as go into a step, and the tokens of each."""
        room = self.chunksize or CHUNK_TOKENS
        chunks: list[tuple[list[Sequence], torch.Tensor]] = []
        for group in self._groups:
            first = group[0]
            size = _call_size(self.model, first.prompt_length - first.n_prefilled, self.chunksize, first.n_prefilled)
            if not first.n_prefilled and not all(
                cache.is_chunk_invariant(first.prompt_length) for cache in self.model.kv_caches()
            ):
                if chunks and size > room:
                    break
                room = max(room, size)
            tokens = first.prompt[first.n_prefilled : first.n_prefilled + min(size, room)]
            chunks.append((group, tokens))
            room -= len(tokens)
            if not room:
                break
        return chunks
