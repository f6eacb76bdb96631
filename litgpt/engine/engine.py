"""Prefill and decode: the one loop behind every way to generate.

A batch of one is a batch. Rows of a ragged batch are prefilled at their own lengths and decoded together; a row that has
finished leaves the computation, and others may take its place at any time.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from litgpt.engine.request import Request
from litgpt.engine.sampling import Draws, draw
from litgpt.engine.stopping import StopMatcher
from litgpt.engine.verification import draw_beside
from litgpt.model import GPT

ROOM = 1024  # least capacity of default caches that are to last
COMPILED_ROOM = 4096  # and of those that code is compiled for
PACKED_TOKENS = 1024  # most tokens of several prompts that go through the model in one call
ENTERING_TOKENS = 256  # and of prompts that enter beside others, which wait meanwhile


def prepare_caches(model: GPT, batch_size: int, max_length: int, roomy: bool = False) -> None:
    """See that the model's caches take `batch_size` rows of `max_length` tokens, before any work is done.

    Default caches are made, or enlarged; caches that were assigned have to do as they are. `roomy` makes them larger than
    needed, so that longer sequences will find them large enough; so does compiled code, which is made for their size.

    Raises:
        ValueError: if the sequences are longer than the model's context, or the caches too small.
    """
    model.expect_length(max_length)
    caches = model.kv_caches()
    if not caches or model.default_kv_caches:
        if max_length > model.max_seq_length:
            raise ValueError(_too_long(model, max_length))
        fits = caches and all(
            cache.batch_size >= batch_size and (cache.policy.evicts or cache.cache_length >= max_length)
            for cache in caches
        )
        if not fits:
            room = max_length
            if roomy or model.static_shapes:
                room = max(COMPILED_ROOM if model.static_shapes else ROOM, 1 << (max_length - 1).bit_length())
            model.set_kv_caches(batch_size, max_seq_length=min(room, model.max_seq_length))
    check_caches(model, batch_size, max_length)


def check_caches(model: GPT, batch_size: int, max_length: int) -> None:
    """See that the caches which the model has take `batch_size` rows of `max_length` tokens.

    Raises:
        ValueError: if they do not.
    """
    caches = model.kv_caches()
    rows = min((cache.batch_size for cache in caches), default=0)
    if rows < batch_size:
        raise ValueError(f"{batch_size} sequences at once, but the caches hold batch_size={rows}")
    slots = min((cache.cache_length for cache in caches if cache.max_prefill_length is not None), default=max_length)
    if slots < max_length:
        raise ValueError(
            f"prompt and new tokens come to {max_length} tokens, but the cache holds cache_length={slots} "
            "and does not evict: ask for fewer tokens, or use a longer or an evicting cache"
        )
    if max_length > model.max_seq_length and not all(cache.unbounded for cache in caches):
        raise ValueError(_too_long(model, max_length))


def _too_long(model: GPT, max_length: int) -> str:
    return (
        f"prompt and new tokens come to {max_length} tokens, but the model's context is {model.max_seq_length}: "
        "shorten the prompt, ask for fewer tokens, or use a cache that evicts (lastrec)"
    )


@torch.inference_mode()
def prefill(
    model: GPT,
    prompts: Sequence[torch.Tensor],
    chunksize: int | None = None,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> torch.Tensor:
    """Run prompts through the model, each in as few calls as the caches take, and get the last token's logits.

    Args:
        model: with caches for as many rows as there are prompts.
        prompts: B tensors of tokens (T_b,), each of at least one token. One tensor several times over is run once; several
            short ones go through the model in one call.
        chunksize: most tokens of a call (None: as many as the caches take).
        start: tokens that the caches hold already for every row; 0 starts anew.
        rows: rows in use that the prompts go to (None: they are the batch).

    Returns:
        Logits (B, V).
    """
    places = list(range(len(prompts))) if rows is None else list(rows)
    leaders: dict[int, int] = {}  # the first one of those that share a tensor runs it
    leader = [leaders.setdefault(id(prompt), i) if start == 0 else i for i, prompt in enumerate(prompts)]
    run = sorted(set(leader))
    if rows is None and len({len(prompts[i]) for i in run}) == 1:  # in one call, of the whole batch
        last = dict(zip(run, _prefill_rows(model, [prompts[i] for i in run], chunksize, start, None), strict=True))
        copies = [run.index(i) for i in leader]
    else:
        if rows is None and start == 0:
            model.start_kv_caches(len(prompts))
        last = {}
        for members in _in_calls(model, {i: len(prompts[i]) for i in run}, chunksize, start):
            inputs, into = [prompts[i] for i in members], [places[i] for i in members]
            prefill_members = _prefill_rows if len(set(map(len, inputs))) == 1 else _prefill_packed
            last.update(zip(members, prefill_members(model, inputs, chunksize, start, into), strict=True))
        copies = list(range(len(model.kv_caches()[0].row_lengths)))
        for i, place in enumerate(places):
            copies[place] = places[leader[i]]
    if len(run) < len(prompts):
        model.reorder_kv_caches(copies)
    return torch.stack([last[i] for i in leader])


def _in_calls(model: GPT, lengths: dict[int, int], chunksize: int | None, start: int) -> list[list[int]]:
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
    model: GPT, prompts: Sequence[torch.Tensor], chunksize: int | None, start: int, rows: list[int]
) -> torch.Tensor:
    """Prefill prompts of several lengths into `rows` of the caches by one call; logits (B, V)."""
    idx = torch.cat(list(prompts))[None]
    return model(idx, start, last_token_only=True, rows=rows, row_sizes=list(map(len, prompts)))[:, -1]


def _prefill_rows(
    model: GPT, prompts: Sequence[torch.Tensor], chunksize: int | None, start: int, rows: list[int] | None
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
    """How many of the tokens that are left of a prompt, of which the caches hold `done`, go through the model in a call."""
    limit = model.kv_cache_max_tokens_forward() if done else model.kv_cache_max_prefill_length()
    return min(x for x in (left, chunksize, limit, model.max_seq_length) if x is not None)


Guesses = tuple[Sequence[int], torch.Tensor | None]
"""Guesses (n,) of a row's next tokens, and the distributions (n, V) that they were drawn from (None: they are certain)."""


class Proposer(Protocol):
    """Guesses how sequences go on. What the model makes of the guesses is exact, however bad they are."""

    def propose(self, rows: Sequence[Draws], limits: Sequence[int]) -> list[Guesses]:
        """For every row, which goes on after its `tokens`, as many guesses as its limit at most. A row is the same object
        in every step."""


class _Row:
    """A row of the batch: its request, and what becomes of the tokens that are drawn for it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.draws = Draws(request.sampling, request.prompt.tolist(), len(request.prompt))
        self.matcher = StopMatcher(request.stop_tokens, request.include_eos)
        self.ready = False  # whether the prompt is in the caches, and the first token drawn

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.request.max_new_tokens - len(self.request.tokens)

    def take(self, token: int, logits: torch.Tensor) -> list[int]:
        """Take the next drawn token; give those that are now known to be output. May finish the request."""
        request, self.ready = self.request, True
        if request.logprobs is not None:
            self._note_logprobs(token, logits)
        self.draws.tokens.append(token)
        request.tokens.append(token)
        out = self.matcher.push(token)
        if self.matcher.stopped:
            request.finish_reason = "stop"
        elif not self.left:
            out += self.matcher.flush()
            request.finish_reason = "length"
        request.released += len(out)
        return out

    def _note_logprobs(self, token: int, logits: torch.Tensor) -> None:
        logprobs = logits.float().log_softmax(dim=-1)
        values, tokens = logprobs.topk(self.request.logprobs)
        self.request.token_logprobs.append(logprobs[token].item())
        self.request.top_logprobs.append(dict(zip(tokens.tolist(), values.tolist(), strict=True)))


@dataclass(eq=False)
class _Entering:
    """A prompt of which `done` tokens are in the caches, in the first of the rows that it is for."""

    prompt: torch.Tensor
    rows: list[_Row]
    done: int = 0


class Engine:
    """A batch of sequences that are decoded together; requests join and leave between steps.

    It works on the caches that the model has (see `prepare_caches`), which are its own while requests are active. The
    output of a request is that of its own batch of one, whatever else is in the batch, up to rounding: in float32 the same
    tokens, in bfloat16 sums in another order may tip a close decision. (With LongRoPE the longest of the requests that
    are added to an empty batch decides for all of them how positions are turned.) Not for several threads at once.

    If the model fails or is interrupted, the caches are emptied, and the requests that were active are left unfinished.

    Args:
        model: in evaluation mode, with caches.
        prompt_chunksize: most tokens of a call in the prefill (None: as many as the caches take, or ENTERING_TOKENS where
            others wait for it).
        proposer: guesses the next tokens of every row; several may then come in a step.
        batch_size: rows of every step, some of them idle, as compiled code wants it (None: as many as there are requests,
            or, in a compiled model, were at most).
    """

    def __init__(
        self,
        model: GPT,
        prompt_chunksize: int | None = None,
        proposer: Proposer | None = None,
        batch_size: int | None = None,
    ) -> None:
        if prompt_chunksize is not None and prompt_chunksize < 1:
            raise ValueError(f"prompt_chunksize must be at least 1 (None: no limit), got {prompt_chunksize}")
        self.model = model
        self.prompt_chunksize = prompt_chunksize
        self.proposer = proposer
        self.batch_size = batch_size
        self.guessed = self.accepted = 0  # tokens that were guessed, and those of them that stood
        self._rows: list[_Row | None] = []  # by row of the caches; None is idle
        self._long = False  # whether LongRoPE turns positions by its long factors
        self._joined: list[tuple[Request, list[int]]] = []  # what the prefill gave
        self._entering: list[_Entering] = []

    @property
    def acceptance_rate(self) -> float:
        """What part of the guesses stood (0 if there were none)."""
        return self.accepted / max(1, self.guessed)

    @property
    def active(self) -> list[Request]:
        """Requests that are not finished."""
        return [row.request for row in self._rows if row is not None and row.request.finish_reason is None]

    @torch.inference_mode()
    def add(self, requests: Sequence[Request], held: int = 0, gradually: bool = False) -> None:
        """Prefill requests into free rows, and draw the first token of each.

        Args:
            requests: those that share a prompt's tensor share its prefill.
            held: first tokens of the prompts that the caches hold already, where these requests are the whole batch.
            gradually: leave the prefill to the next steps, each of which does a part of it: so those that are active go
                on meanwhile, however long the prompts are.

        Raises:
            ValueError: if a request does not fit, before any work; those that are active are not disturbed.
        """
        self.check(requests, held)
        active = self.active
        if held and active:
            raise ValueError(f"the caches hold {held} tokens of no request while others are active")
        check_caches(self.model, len(active) + len(requests), 1)
        if active and not all(self.can_join(request) for request in requests):
            raise ValueError(
                "with LongRoPE, long and short sequences cannot be in one batch: wait until the others are done"
            )
        if held and gradually:
            raise ValueError("prompts that are held in part cannot be added gradually")
        rows = [_Row(request) for request in requests]
        with self._emptied_on_failure():
            if active:
                free = [i for i, row in enumerate(self._rows) if row is None or row.request.finish_reason]
                missing = len(rows) - len(free)
                if missing > 0:
                    self.model.extend_kv_caches(missing)
                    free += range(len(self._rows), len(self._rows) + missing)
                    self._rows += [None] * missing
                places = free[: len(rows)]
            else:
                places, self._rows = None, [None] * len(rows)
                longest = max(request.length for request in requests)
                self._long = self.model.needs_long_rope(longest)
                if not held:
                    self.model.expect_length(longest)
            if gradually:
                self._let_enter(rows, places)
            else:
                prompts = {id(request.prompt): request.prompt[held:] for request in requests}
                prompts = [prompts[id(request.prompt)] for request in requests]
                logits = prefill(self.model, prompts, self.prompt_chunksize, held, places)
            for place, row in zip(range(len(rows)) if places is None else places, rows, strict=True):
                self._rows[place] = row
            if self.batch_size is not None and len(self._rows) < self.batch_size:
                self.model.extend_kv_caches(self.batch_size - len(self._rows))
                self._rows += [None] * (self.batch_size - len(self._rows))
            if not gradually:
                self._joined += self._first_tokens(rows, logits)

    def _first_tokens(self, rows: Sequence[_Row], logits: torch.Tensor) -> list[tuple[Request, list[int]]]:
        """Draw the first token of each row."""
        tokens = self._draw(logits, rows)
        return [(row.request, row.take(token, x)) for row, token, x in zip(rows, tokens, logits, strict=True)]

    def _let_enter(self, rows: Sequence[_Row], places: Sequence[int] | None) -> None:
        """Note the prompts of rows, for which the caches have these places, empty from now on (None: the whole batch)."""
        if places is None:
            self.model.start_kv_caches(len(rows))
        else:
            lengths = self.model.kv_caches()[0].row_lengths
            self.model.rewind_kv_caches([x if i in places else 0 for i, x in enumerate(lengths)])
        alike: dict[int, list[_Row]] = defaultdict(list)
        for row in rows:
            alike[id(row.request.prompt)].append(row)
        self._entering += [_Entering(same[0].request.prompt, same) for same in alike.values()]

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, list[int]]]:
        """Go one step on in every active request: the tokens that are now known to be output.

        These are often one, none while a stop sequence may have begun, several when it turns out that it had not or when
        guesses stand. The first tokens of requests that have just been added come in a step of their own, unless they were
        added gradually.
        """
        if self._joined:
            released, self._joined = self._joined, []
            return released
        if not self.active:
            return []
        with self._emptied_on_failure():
            released = dict(self._enter()) if self._entering else {}
            self._let_finished_leave()
            if any(row is not None and row.ready for row in self._rows):
                for request, tokens in self._advance():
                    released[request] = released.get(request, []) + tokens
            return list(released.items())

    def cancel(self, request: Request) -> None:
        """End a request: its row is free, and no more tokens come."""
        if request in self.active:
            request.finish_reason = "cancelled"
            self._joined = [(joined, out) for joined, out in self._joined if joined is not request]
            for entering in self._entering:
                first = entering.rows[0]
                entering.rows = [row for row in entering.rows if row.request is not request]
                if entering.rows and entering.rows[0] is not first:  # which takes over what is in the caches
                    i, j = self._rows.index(first), self._rows.index(entering.rows[0])
                    self._rows[i], self._rows[j] = self._rows[j], self._rows[i]
            self._entering = [entering for entering in self._entering if entering.rows]

    def _advance(self) -> list[tuple[Request, list[int]]]:
        """Feed every row that is ready its last token and its guesses, and see what follows."""
        guesses = self._guess()
        T = 1 + max((len(tokens) for tokens, _ in guesses.values()), default=0)
        ready = [i for i, row in enumerate(self._rows) if row is not None and row.ready]
        # idle rows come along, as compiled code wants it, but not those whose prompts are still on their way
        called = ready if self._entering else list(range(len(self._rows)))
        fed = [[0] * T for _ in called]
        for at, i in enumerate(called):
            if self._rows[i] is not None:
                tokens = [self._rows[i].draws.tokens[-1], *(guesses[i][0] if i in guesses else ())]
                fed[at] = tokens + [0] * (T - len(tokens))
        idx = torch.tensor(fed, device=self.model.transformer.wte.weight.device)
        rows, position = None, self.model.next_token_pos
        if self._entering:
            lengths = self.model.kv_caches()[0].row_lengths
            rows, position = called, max(lengths[i] for i in called)
        logits = self.model(idx, position, last_token_only=T == 1, rows=rows)
        if len(ready) < len(called):
            logits = logits[ready]
        released, undo = [], [T if i in called else 0 for i in range(len(self._rows))]  # idle rows stay empty
        if T == 1:
            tokens = self._draw(logits[:, -1], [self._rows[i] for i in ready])
            for i, token, x in zip(ready, tokens, logits, strict=True):
                released.append((self._rows[i].request, self._rows[i].take(token, x[-1])))
                undo[i] = 0
        else:
            for i, x in zip(ready, logits, strict=True):
                out, taken = self._settle(self._rows[i], x, guesses.get(i, ((), None)))
                released.append((self._rows[i].request, out))
                undo[i] -= taken
        if any(undo):
            self.model.rewind_kv_caches(undo)
        return released

    def _enter(self) -> list[tuple[Request, list[int]]]:
        """Bring the next tokens of prompts that enter; what comes of those that are in the caches then.

        Where outputs depend on how a prompt is cut into calls, they do on the first one, which is that of its own run.
        """
        room = self.prompt_chunksize or ENTERING_TOKENS
        some: list[tuple[_Entering, torch.Tensor]] = []
        for entering in self._entering:
            left = len(entering.prompt) - entering.done
            own = _call_size(self.model, left, self.prompt_chunksize, entering.done)
            if not entering.done and not all(
                cache.is_chunk_invariant(len(entering.prompt)) for cache in self.model.kv_caches()
            ):
                if some and own > room:
                    break
                room = max(room, own)
            some.append((entering, entering.prompt[entering.done : entering.done + min(own, room)]))
            room -= len(some[-1][1])
            if not room:
                break
        places = [self._rows.index(entering.rows[0]) for entering, _ in some]
        logits = self.model(
            torch.cat([tokens for _, tokens in some])[None],
            max(entering.done for entering, _ in some),
            last_token_only=True,
            rows=places,
            row_sizes=[len(tokens) for _, tokens in some],
        )[:, -1]
        copies, rows, of = list(range(len(self._rows))), [], []
        for at, (entering, tokens) in enumerate(some):
            entering.done += len(tokens)
            if entering.done == len(entering.prompt):
                for row in entering.rows:
                    copies[self._rows.index(row)] = places[at]
                rows += entering.rows
                of += [at] * len(entering.rows)
        if not rows:
            return []
        self._entering = [entering for entering in self._entering if entering.done < len(entering.prompt)]
        if len(rows) > len(set(of)):
            self.model.reorder_kv_caches(copies)
        return self._first_tokens(rows, logits[of])

    def _settle(self, row: _Row, logits: torch.Tensor, guesses: Guesses) -> tuple[list[int], int]:
        """Draw a row's next tokens for as long as its guesses stand, and one more; logits (n + 1 or more, V).

        Returns the tokens that are now known to be output, and how many were drawn.
        """
        tokens, guessed_from = guesses
        out: list[int] = []
        self.guessed += len(tokens)
        for place, guess in enumerate(tokens):
            q = None if guessed_from is None else guessed_from[place]
            (token,) = self.model.agree([draw_beside(logits[place], guess, q, row.draws)])
            out += row.take(token, logits[place])
            self.accepted += token == guess
            if token != guess or row.request.finish_reason:
                return out, place + 1
        last = logits[len(tokens)]
        out += row.take(*self._draw(last[None], [row]), last)
        return out, len(tokens) + 1

    def _draw(self, logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
        """The next token of each row, from logits (B, V)."""
        return self.model.agree(draw(logits, [row.draws for row in rows]).tolist())

    def _guess(self) -> dict[int, Guesses]:
        """Guesses by row, those rows that have any, not more than can be taken back."""
        if self.proposer is None:
            return {}
        room = self.model.kv_cache_max_tokens_tentative() - 1
        limits = {i: min(room, row.left - 1) for i, row in enumerate(self._rows) if row is not None and row.ready}
        asked = [i for i, limit in limits.items() if limit > 0]
        if not asked:
            return {}
        guesses = self.proposer.propose([self._rows[i].draws for i in asked], [limits[i] for i in asked])
        return {i: found for i, found in zip(asked, guesses, strict=True) if len(found[0])}

    def _let_finished_leave(self) -> None:
        """Make the batch as small as it may be: the last row moves into a gap, so that dropping one costs the copy of one.

        Where the batch is to keep its size, rows become idle instead: they are empty, and stay so.
        """
        gone = [i for i, row in enumerate(self._rows) if row is not None and row.request.finish_reason]
        if not gone:
            return
        if self.batch_size is not None or self.model.static_shapes:
            lengths = self.model.kv_caches()[0].row_lengths
            self.model.rewind_kv_caches([lengths[i] if i in gone else 0 for i in range(len(lengths))])
            for i in gone:
                self._rows[i] = None
            return
        places = list(range(len(self._rows)))
        for i in reversed(gone):
            places[i], self._rows[i] = places[-1], self._rows[-1]
            places.pop(), self._rows.pop()
        if places:
            self.model.reorder_kv_caches(places)
        else:
            self.model.crop_kv_caches(0)

    def can_join(self, request: Request, others: Sequence[Request] = ()) -> bool:
        """Whether a request goes with those that are active, or with `others` where none are: with LongRoPE, positions of
        long sequences are turned otherwise than those of short ones."""
        if not self.active and not others:
            return True
        long = self._long if self.active else self.model.needs_long_rope(others[0].length)
        return self.model.needs_long_rope(request.length) == long

    def check(self, requests: Sequence[Request], held: int = 0) -> None:
        """Raise `ValueError` for requests that could not be added even if the batch were empty."""
        if not requests:
            raise ValueError("there are no requests to add")
        if held >= min(len(request.prompt) for request in requests):
            raise ValueError(f"{held} tokens of a prompt are held, which leaves none to run")
        if any(request.tokens or request.finish_reason for request in requests):
            raise ValueError("a request can be added only once")
        check_caches(self.model, len(requests), max(request.length for request in requests))
        vocabulary = self.model.config.padded_vocab_size
        for request in requests:
            for token in request.sampling.logit_bias or ():
                if token >= vocabulary:
                    raise ValueError(f"logit_bias for token {token}, but there are {vocabulary}")
            if (request.logprobs or 0) > vocabulary:
                raise ValueError(f"logprobs={request.logprobs} is more than the {vocabulary} tokens that there are")

    @contextmanager
    def _emptied_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for cache in self.model.kv_caches():
                cache.clear()
            self._rows, self._joined, self._entering = [], [], []
            raise


def decode(engine: Engine, requests: Sequence[Request], held: int = 0) -> Iterator[list[list[int] | None]]:
    """Prefill requests into an engine that has no others, and generate until all are finished.

    Yields:
        For every step, each request's tokens that are now known to be output, or None once it is finished.
    """
    place = {id(request): i for i, request in enumerate(requests)}
    engine.add(requests, held)
    while steps := engine.step():
        released: list[list[int] | None] = [None] * len(requests)
        for request, tokens in steps:
            released[place[id(request)]] = tokens
        yield released
