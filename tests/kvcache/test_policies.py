"""Policies against brute force: put every token into its slot, one after the other, and look at what is left."""

import pytest
import torch

from litgpt.kvcache.policies.dense import DensePolicy
from litgpt.kvcache.policies.lastrec import LastRecentPolicy

from .reference import visible

LONGEST = 23
POLICIES = [DensePolicy(LONGEST), DensePolicy(1)] + [
    LastRecentPolicy(cache_length, sinks) for cache_length in (1, 2, 5, 8) for sinks in range(min(cache_length, 4))
]
ids = [f"{type(p).__name__}-{p.cache_length}-{p.n_sink}" for p in POLICIES]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=ids)


def stored_after(policy, length):
    """Slot -> position after `length` tokens, by putting them in one by one."""
    slots = policy.slots(torch.arange(length)).tolist()
    return dict(zip(slots, range(length), strict=True))


def longest(policy):
    return LONGEST if policy.evicts else policy.cache_length


@every_policy
def test_a_sequence_that_fits_is_stored_in_order(policy):
    positions = torch.arange(policy.cache_length)
    assert policy.slots(positions).tolist() == positions.tolist()


@every_policy
def test_slots_are_within_the_cache_and_of_the_shape_asked_for(policy):
    positions = torch.arange(longest(policy))
    slots = policy.slots(positions)
    assert 0 <= slots.min() <= slots.max() < policy.cache_length
    assert torch.equal(policy.slots(positions.view(1, -1, 1)), slots.view(1, -1, 1))


@every_policy
def test_slot_positions_and_held_are_what_is_left_of_a_sequence(policy):
    lengths = list(range(longest(policy) + 1))
    table = policy.slot_positions(torch.tensor(lengths)).tolist()
    for length in lengths:
        stored = stored_after(policy, length)
        assert table[length] == [stored.get(slot, -1) for slot in range(policy.cache_length)]
        first, last = policy.held(length)
        assert [*first, *last] == sorted(stored.values())


@every_policy
def test_held_is_what_queries_may_see(policy):
    """The last token of a sequence sees exactly what is held: an evicting cache gives away nothing it could show."""
    for length in range(1, longest(policy) + 1):
        first, last = policy.held(length)
        assert [*first, *last] == visible(length - 1, capacity=policy.cache_length, sinks=policy.n_sink)


@every_policy
@pytest.mark.parametrize("window", [None, 2, 3, 4, 6, 9])
def test_crop_limit_is_the_least_length_to_go_back_to(policy, window):
    def exact(length, n):
        """Whether the tokens still stored are all that the query at n sees of those before it."""
        needed = visible(n, capacity=policy.cache_length, sinks=policy.n_sink, window=window)[:-1]
        return set(needed) <= set(stored_after(policy, length).values())

    for length in range(longest(policy) + 1):
        limit = policy.crop_limit(length, window)
        assert all(exact(length, n) for n in range(limit, length + 1)), "cropping loses tokens that are seen later"
        if limit and policy.reach > 1:
            assert not exact(length, limit - 1), "cropping further would lose nothing"


@pytest.mark.parametrize(("cache_length", "sinks"), [(4, 4), (4, -1), (1, 1)])
def test_sinks_leave_room_for_other_tokens(cache_length, sinks):
    with pytest.raises(ValueError, match=rf"n_sink.*{cache_length - 1}.*{sinks}"):
        LastRecentPolicy(cache_length, sinks)
