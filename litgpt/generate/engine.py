"""Prefill and decode: the one loop behind every way to generate.

A batch of one is a batch. Rows of a ragged batch are prefilled at their own lengths and decoded together; a row that has
finished leaves the computation.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from litgpt.generate.sampling import check_sampling, sample_rows
from litgpt.generate.stopping import StopMatcher
from litgpt.model import GPT

ROOM = 1024  # least capacity of default caches that are to last


def prepare_caches(model: GPT, batch_size: int, max_length: int, roomy: bool = False) -> None:
    """See that the model's caches take `batch_size` rows of `max_length` tokens, before any work is done.

    Default caches are made, or enlarged; caches that were assigned have to do as they are. `roomy` makes them larger than
    needed, so that longer sequences will find them large enough; so does compiled code, which is made for their size.

    Raises:
        ValueError: if the sequences are longer than the model's context, or the caches too small.
    """
    model.expect_length(max_length)
    caches = model.kv_caches()
    if caches and not model.default_kv_caches:
        rows = min(cache.batch_size for cache in caches)
        if rows < batch_size:
            raise ValueError(f"{batch_size} sequences at once, but the assigned caches hold batch_size={rows}")
        slots = min(
            (cache.cache_length for cache in caches if cache.max_prefill_length is not None), default=max_length
        )
        if slots < max_length:
            raise ValueError(
                f"prompt and new tokens come to {max_length} tokens, but the assigned cache holds cache_length={slots} "
                "and does not evict: ask for fewer tokens, or use a longer or an evicting cache"
            )
        if all(cache.unbounded for cache in caches):
            return
    if max_length > model.max_seq_length:
        raise ValueError(
            f"prompt and new tokens come to {max_length} tokens, but the model's context is {model.max_seq_length}: "
            "shorten the prompt, ask for fewer tokens, or use a cache that evicts (lastrec)"
        )
    if not caches or model.default_kv_caches:
        fits = caches and all(
            cache.batch_size >= batch_size and (cache.policy.evicts or cache.cache_length >= max_length)
            for cache in caches
        )
        if not fits:
            room = max(ROOM, 1 << (max_length - 1).bit_length()) if roomy or model.static_decode else max_length
            model.set_kv_caches(batch_size, max_seq_length=min(room, model.max_seq_length))


@torch.inference_mode()
def prefill(model: GPT, prompts: Sequence[torch.Tensor], chunksize: int | None = None, start: int = 0) -> torch.Tensor:
    """Run prompts through the model, each in as few calls as the caches take, and get the last token's logits.

    Args:
        model: with caches for as many rows as there are prompts.
        prompts: B tensors of tokens (T_b,), each of at least one token. One tensor B times over is run once.
        chunksize: most tokens of a call (None: as many as the caches take).
        start: tokens that the caches hold already for every row; 0 starts anew.

    Returns:
        Logits (B, V).
    """
    if start == 0 and len(prompts) > 1 and all(prompt is prompts[0] for prompt in prompts):
        logits = _prefill_rows(model, prompts[0][None], chunksize, start, None)
        model.reorder_kv_caches([0] * len(prompts))
        return logits.expand(len(prompts), -1)
    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[len(prompt)].append(row)
    if len(groups) == 1:
        return _prefill_rows(model, torch.stack(list(prompts)), chunksize, start, None)
    if start == 0:
        model.start_kv_caches(len(prompts))
    rows_logits: dict[int, torch.Tensor] = {}
    for rows in groups.values():
        last = _prefill_rows(model, torch.stack([prompts[row] for row in rows]), chunksize, start, rows)
        rows_logits.update(zip(rows, last, strict=True))
    return torch.stack([rows_logits[row] for row in range(len(prompts))])


def _prefill_rows(
    model: GPT, idx: torch.Tensor, chunksize: int | None, start: int, rows: list[int] | None
) -> torch.Tensor:
    """Prefill prompts of one length, (B, T) tokens, into `rows` of the caches; logits (B, V)."""
    T, done = idx.shape[1], 0
    while True:
        limit = model.kv_cache_max_prefill_length() if start + done == 0 else model.kv_cache_max_tokens_forward()
        size = min(x for x in (T - done, chunksize, limit, model.max_seq_length) if x is not None)
        chunk = idx[:, done : done + size]
        if done + size == T:
            return model(chunk, start + done, last_token_only=True, rows=rows)[:, -1]
        model(chunk, start + done, skip_lm_head=True, rows=rows)
        done += size


@torch.inference_mode()
def decode(
    model: GPT,
    logits: torch.Tensor,
    limits: Sequence[int],
    sample_args: Sequence[dict[str, Any]],
    stop_tokens: Sequence[Sequence[int]] = (),
    include_eos: bool = True,
    fed: list[int] | None = None,
) -> Iterator[list[list[int] | None]]:
    """Sample, stop, feed back: from the logits of the prefill on, until every row has ended.

    Args:
        model: its caches at the end of the prompts.
        logits: of the prompts' last tokens, (B, V).
        limits: most new tokens for each row.
        sample_args: `temperature`, `top_k`, `top_p` for each row.
        stop_tokens: sequences of tokens that end a row.
        include_eos: whether such a sequence is given out.
        fed: if given, tokens of the first row are noted here once they are in the caches.

    Yields:
        For every step, each row's tokens that are now known to be output (often one; none while a stop sequence may have
        begun, several when it turns out that it had not), or None once the row has ended.
    """
    for args in sample_args:
        check_sampling(**{k: v for k, v in args.items() if k != "generator"})
    matchers = [StopMatcher(stop_tokens, include_eos) for _ in limits]
    left = list(limits)
    active = [row for row in range(len(limits)) if left[row] > 0]
    in_caches = list(range(len(limits)))  # the row that each place in the caches belongs to
    if fed is not None and len(limits) != 1:
        raise ValueError("fed tokens are noted for a single row only")
    while active:
        tokens = _sample(logits, [sample_args[max(row, 0)] for row in in_caches])
        token_list = tokens.tolist()
        released: list[list[int] | None] = [None] * len(limits)
        for place, row in enumerate(in_caches):
            if row not in active:
                continue
            left[row] -= 1
            out = matchers[row].push(token_list[place])
            if matchers[row].stopped or left[row] == 0:
                out += matchers[row].flush()
                active.remove(row)
            released[row] = out
        yield released
        if not active:
            return
        if any(row not in active for row in in_caches if row >= 0):
            places, in_caches = _without_finished(in_caches, active, keep_size=model.static_decode)
            model.reorder_kv_caches(places)
            tokens = tokens[places]
        logits = model(tokens[:, None], model.next_token_pos, last_token_only=True)[:, -1]
        if fed is not None:
            fed.append(token_list[0])


def _without_finished(in_caches: list[int], active: list[int], keep_size: bool) -> tuple[list[int], list[int]]:
    """Which places to take so that only active rows remain, and the rows then in the caches.

    The last row moves into a gap, so that dropping a row costs the copy of one. With `keep_size`, for compiled code, the
    batch does not shrink: gaps are filled with a copy of an active row, noted as row -1.
    """
    places, rows = list(range(len(in_caches))), list(in_caches)
    for place in reversed(range(len(rows))):
        if rows[place] in active:
            continue
        if keep_size:
            places[place], rows[place] = in_caches.index(active[0]), -1
        else:
            places[place], rows[place] = places[-1], rows[-1]
            places.pop(), rows.pop()
    return places, rows


def _sample(logits: torch.Tensor, sample_args: list[dict[str, Any]]) -> torch.Tensor:
    """One token for every row of logits (B, V), (B,); at once where rows have the same settings."""
    if all(args == sample_args[0] for args in sample_args):
        return sample_rows(logits, **sample_args[0])
    return torch.cat([sample_rows(row[None], **args) for row, args in zip(logits, sample_args, strict=True)])
