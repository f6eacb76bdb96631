"""Guarantee G7 of a key-value cache: crop, fork, reorder, state and load_state go on bit-identically."""

import dataclasses
import pickle

import pytest
import torch

from .cases import CACHES, KINDS, call, every_kind, feed, go_on, snapshot, unchanged
from .reference import visible


def crop_is_exact(case, length, n):
    """Whether all that the query at n sees of those before it is held after `length` tokens."""
    reference = case.reference()
    if case.tail is not None:
        tokens = case.tokens(length, 1)
        reference.start(tokens[1], 1)
        for one in zip(*(x.split(1, 2) for x in tokens), strict=True):
            reference.call(*one)
        return n == 0 or n >= reference.limit(reference.rows[0])
    needed = visible(n, 0, reference.capacity, case.n_sink, case.window)[:-1]
    kept = range(length) if reference.capacity is None else visible(length - 1, 0, reference.capacity, case.n_sink)
    return set(needed) <= set(kept)


@every_kind
@pytest.mark.parametrize("length", [1, 11, 12, 13, 26])
def test_G7_after_crop_everything_is_as_if_the_tokens_had_never_come(case, length):
    tokens, more = case.tokens(length), case.tokens(length + 9)
    full = case.cache()
    feed(full, tokens, (1,) * length)
    limit, exact = full.crop_limit, [crop_is_exact(case, length, n) for n in range(length + 1)]
    assert all(exact[limit:])
    assert limit == 0 or not exact[limit - 1]
    assert full.supports_crop == all(exact)
    for n in range(length + 1):
        cache, before = full.fork(), snapshot(full)
        if 0 < n < limit:
            with pytest.raises(ValueError, match=rf"{n} of {length} .*{limit}"):
                cache.crop(n)
            assert unchanged(cache, before)
            continue
        cache.crop(n)
        never = case.cache()
        if n:
            feed(never, tokens, (1,) * n)
        assert cache.next_token_pos == never.next_token_pos == n
        for cuts in [(1, 1, 7), (9,)]:
            first, second = cache.fork(), never.fork()
            rest = [x[:, :, n:] for x in more]
            assert torch.equal(feed(first, rest, cuts, n), feed(second, rest, cuts, n))
            # as the numbers are right, so must be the truth about slots
            stored, positions = first.get_keys_values().keys(), first.token_positions()
            here = positions[0, 0] >= 0
            keys, _ = case.as_stored(
                *(torch.cat((x[:, :, :n], y), 2) for x, y in zip(tokens[1:], rest[1:], strict=True))
            )
            assert torch.equal(stored[0, 0, here], keys[0, 0, positions[0, 0, here]])


@pytest.mark.parametrize("case", [c for c in KINDS if c.evicts], ids=str)
def test_G7_cropping_in_steps_is_refused_where_cropping_at_once_is(case):
    cache, length = case.cache(), 26
    feed(cache, case.tokens(length), (20, 1, 5))
    limit = cache.crop_limit
    for n in range(length, limit - 1, -1):
        cache.crop(n)
        assert cache.crop_limit == limit
        assert not cache.supports_crop
    with pytest.raises(ValueError, match=str(limit)):
        cache.crop(limit - 1)
    cache.crop(0)
    assert cache.supports_crop


@every_kind
def test_G7_crop_takes_the_last_tokens_of_every_row(case):
    cache, reference = case.cache(3), case.reference()
    cache.start(3)
    tokens = [case.tokens(T, 1) for T in (4, 11, 9)]
    reference.start(tokens[0][1], 3)
    for row, chunk in enumerate(tokens):
        call(cache, *chunk, rows=[row])
        reference.call(*chunk, rows=[row])
    # where the shortest row is empty; a policy that has looked at all queries does not forget what it saw
    assert cache.crop_limit == (11 if case.looks else 7)
    with pytest.raises(ValueError, match=f"{cache.crop_limit - 1} of 11 "):
        cache.crop(cache.crop_limit - 1)
    n = max(8, cache.crop_limit)
    cache.crop(n)
    reference.crop(n)
    assert cache.row_lengths == (n - 7, n, n - 2)
    for T in (1, 3, 1):
        chunk = case.tokens(T, 3)
        case.close(call(cache, *chunk), reference.call(*chunk))


def worn(case):
    """A cache (of 4 rows) after a ragged batch of 3 and, where it may, a step back."""
    cache = case.cache(4)
    cache.start(3)
    for row, T in enumerate((9, 4, 11)):
        call(cache, *case.tokens(T, 1), rows=[row])
    call(cache, *case.tokens(3, 3))
    cache.crop(max(cache.crop_limit, 13))
    return cache


@every_kind
def test_G7_forks_and_their_origin_go_their_own_ways(case):
    cache = worn(case)
    before, tokens = snapshot(cache), case.tokens(8, 3)
    twin, sibling = cache.fork(), cache.fork()
    assert type(twin) is type(cache)
    assert twin.get_params() == cache.get_params()
    first = go_on(twin, tokens)
    assert unchanged(cache, before)
    go_on(cache, case.tokens(8, 3))
    cache.clear()
    assert torch.equal(first, go_on(sibling, tokens))


@every_kind
def test_a_pickled_cache_goes_on_bit_identically(case):
    cache, tokens = worn(case), case.tokens(8, 3)
    copy = pickle.loads(pickle.dumps(cache))
    assert type(copy) is type(cache)
    assert torch.equal(go_on(copy, tokens), go_on(cache, tokens))


@every_kind
def test_G7_a_restored_cache_goes_on_bit_identically(case, tmp_path):
    cache, tokens = worn(case), case.tokens(8, 3)
    state = cache.state()
    torch.save(state, tmp_path / "state")
    expected, stored = go_on(cache, tokens), cache.token_positions()
    used = worn(case)
    for restored in (cache, used, case.cache(3)):
        restored.load_state(state)
        assert torch.equal(go_on(restored, tokens), expected)
        assert torch.equal(restored.token_positions(), stored)
    cache.load_state(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(go_on(cache, tokens), expected)
    empty = case.cache()
    cache.load_state(empty.state())
    assert (cache.next_token_pos, cache.eff_batch_size) == (0, None)


@every_kind
def test_G7_a_state_that_does_not_fit_is_refused(case):
    state, good = worn(case).state(), worn(case)
    other_dtype = dataclasses.replace(case, dtype=torch.float64).cache(4)
    shorter = dataclasses.replace(case, slots=10).cache(4)
    other_heads = dataclasses.replace(case, heads=(4, 1)).cache(4)
    others = [shorter, other_heads, case.cache(2)]
    if case.storage == "default":  # others keep the same numbers for any dtype
        others.append(other_dtype)
    for cache in others:
        before = snapshot(cache)
        with pytest.raises(ValueError, match=r"\d"):
            cache.load_state(state)
        assert unchanged(cache, before)
    feed(good, case.tokens(26), (26,))
    for other in CACHES:  # what a policy left in its slots means nothing to another one
        other = dataclasses.replace(other, slots=good.cache_length)
        mine = case.name, case.n_sink, case.tail
        if other.storage == case.storage and (other.name, other.n_sink, other.tail) != mine and case.evicts:
            cache = other.cache(4)
            with pytest.raises(ValueError, match=f"{type(good.policy).__name__}.*Policy"):
                cache.load_state(good.state())
            assert cache.eff_batch_size is None


@every_kind
def test_G7_reordered_rows_are_the_rows_they_were(case):
    cache = worn(case)
    for rows in ([2, 0, 1], [1], [2, 2, 0, 2]):
        mixed, plain, tokens = cache.fork(), cache.fork(), case.tokens(8, 3)
        mixed.reorder(rows)
        assert mixed.row_lengths == tuple(cache.row_lengths[row] for row in rows)
        assert torch.equal(mixed.token_positions(), cache.token_positions()[rows][:, :, : mixed.current_length])
        case.close(go_on(mixed, [x[rows] for x in tokens]), go_on(plain, tokens)[rows].double())


@every_kind
def test_G7_one_row_goes_on_in_another_row_of_another_batch(case):
    cache, other, before = worn(case), case.cache(3), case.cache(3)
    tokens = case.tokens(8, 1)
    for row in range(3):
        state = cache.state(row)
        other.start(3)
        others = case.tokens(5, 1)
        call(other, *others, rows=[0])
        other.load_state(state, row=2)
        assert other.row_lengths == (5, 0, cache.row_lengths[row])
        assert other.rewind_limit(2) == cache.rewind_limit(row)
        before.start(3)
        call(before, *others, rows=[0])
        follow_up = [x.split((1, 6, 1), 2) for x in tokens]
        for part in zip(*follow_up, strict=True):
            expected = call(cache, *part, rows=[row])
            assert torch.equal(call(other, *part, rows=[2]), expected)
        assert torch.equal(call(other, *others, rows=[0]), call(before, *others, rows=[0]))


@every_kind
def test_G7_the_state_of_a_row_is_that_of_a_batch_of_one(case):
    cache, one = worn(case), case.cache(1)
    one.load_state(cache.state_of_row(1))
    chunk = case.tokens(3, 1)
    assert torch.equal(call(one, *chunk), call(cache, *chunk, rows=[1]))


@every_kind
def test_G7_one_row_goes_back_alone(case):
    cache = worn(case)
    shorter, lengths = cache.fork(), cache.row_lengths
    shorter.crop(limit := shorter.rewind_limit(1), row=1)
    assert shorter.row_lengths == (lengths[0], limit, *lengths[2:])
    with pytest.raises(ValueError, match="row 3 is not in use"):
        shorter.crop(0, row=3)


def test_G7_a_row_takes_no_state_of_another_shape():
    case, wider = CACHES[0], dataclasses.replace(CACHES[0], heads=(4, 4))
    cache, other = worn(case), wider.cache(3)
    other.start(2)
    with pytest.raises(ValueError, match="keys"):
        other.load_state_of_row(1, cache.state_of_row(0))
    assert other.row_lengths == (0, 0)
