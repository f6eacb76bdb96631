"""The guarantees of a key-value cache over policy x heads x window x soft-capping x dtype x chunking (G7: `test_state`)."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.config import Config
from litgpt.kernels import ops
from litgpt.kvcache import KVCacheParams
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.storages import STORAGES
from litgpt.kvcache.testing import KV_CACHE_NAMES

from .cases import (
    CACHES,
    KINDS,
    ROOM,
    SCORED,
    SLOTS,
    D,
    call,
    every_cache,
    every_kind,
    feed,
    follow,
    go_on,
    snapshot,
    unchanged,
)
from .reference import visible

PAIRS = [  # every two of heads, soft-capping and dtype together
    ((4, 4), None, torch.float32),
    ((4, 4), 3.0, torch.bfloat16),
    ((4, 2), 3.0, torch.float32),
    ((4, 2), None, torch.bfloat16),
    ((4, 1), None, torch.float32),
    ((4, 1), 3.0, torch.bfloat16),
]
EVERYTHING = [
    dataclasses.replace(case, heads=heads, softcap=softcap, dtype=dtype)
    for case in KINDS
    if case.tail is None
    for heads, softcap, dtype in (PAIRS if case.storage == "default" else PAIRS[1:3])
]
EVERYTHING += [
    dataclasses.replace(case, heads=heads, softcap=softcap, dtype=dtype)
    for case in SCORED
    for heads, softcap, dtype in [((4, 2), None, torch.float32), ((4, 1), 3.0, torch.bfloat16)]
]

# how a sequence is cut into calls
CUTS = [(26,), (1,) * 26, (7, *(1,) * 19), (12, 14), (5, 9, 12), (3, 23), (20, 1, 5), (11, 1, 1, 13), (13, 2, 2, 9)]


def test_every_named_cache_is_in_the_contract():
    names = {case.name for case in CACHES}
    assert names <= set(KV_CACHE_NAMES)
    assert {
        f"{policy}-default" for policy in POLICIES
    } <= names  # each policy, and each storage with policies of all kinds
    storages = [name for name, storage in STORAGES.items() if not storage.blocks]
    assert {f"{policy}-{storage}" for policy in ("dense", "lastrec", "h2o") for storage in storages} <= names


@pytest.mark.parametrize("case", EVERYTHING, ids=str)
def test_G1_G3_outputs_are_those_of_masked_attention_however_the_sequence_is_cut(case):
    tokens = case.tokens(26)
    for cuts in CUTS:
        case.close(feed(case.cache(), tokens, cuts), follow(case.reference(), tokens, cuts))


@pytest.mark.parametrize("case", [c for c in KINDS if c.evicts], ids=str)
def test_G1_nothing_differs_from_a_dense_cache_before_the_first_eviction(case):
    dense = dataclasses.replace(case, name=f"dense-{case.storage}", n_sink=0, tail=None)
    tokens = case.tokens(SLOTS)
    for cuts in [(SLOTS,), (1,) * SLOTS, (5, 1, 6)]:
        # a policy that looks at all queries cuts a call where it looks, and rounds differently
        tolerance = 0 if case.tail is None else 1e-5
        found, expected = (feed(each.cache(), tokens, cuts) for each in (case, dense))
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


LONG_CUTS = [(5, 150), (600,), (1, 599), (300, 1, 299), (560, 40)]
LONG = [(case, LONG_CUTS[(i + j) % 5]) for i, case in enumerate(c for c in KINDS if c.tail != 1) for j in (0, 1, 3)]


@pytest.mark.parametrize(("case", "cuts"), LONG, ids=str)
def test_G1_G3_hold_for_calls_longer_than_a_tile(case, cuts):
    window = {None: None, 5: 33, 20: 100}[case.window]  # with 100, sinks are seen by the first pieces of a call only
    case = dataclasses.replace(
        case, heads=(2, 1), slots=70 if case.evicts else 600, window=window, tail=case.tail and 16
    )
    tokens = case.tokens(sum(cuts), batch=1)
    case.close(feed(case.cache(1), tokens, cuts), follow(case.reference(), tokens, cuts))


@every_kind
@pytest.mark.parametrize("cuts", [(26,), (1,) * 26, (4, 22), (20, 1, 5)], ids=len)
def test_G2_a_slot_holds_the_token_whose_position_it_names(case, cuts):
    tokens, cache, reference = case.tokens(26), case.cache(3), case.reference()
    feed(cache, tokens, cuts)
    follow(reference, tokens, cuts)
    positions, stored, expected = cache.token_positions(), cache.get_keys_values(), case.as_stored(*tokens[1:])
    assert positions.shape == stored.keys().shape[:3] == (2, case.heads[1], cache.current_length)
    assert positions.dtype == torch.int64
    for b, g in itertools.product(range(2), range(case.heads[1])):
        assert sorted(positions[b, g].tolist()) == reference.kept(reference.rows[b], g)
        assert torch.equal(stored.keys()[b, g], expected[0][b, g, positions[b, g]])
        assert torch.equal(stored.values()[b, g], expected[1][b, g, positions[b, g]])


def attended(case, cuts):
    """Which tokens each query attends to: with keys of zero all weights are equal, and values are one-hot."""
    T = sum(cuts)
    config = Config(n_layer=1, n_embd=64, n_head=1, head_size=64, block_size=128, sliding_window_size=case.window)
    params = KVCacheParams.from_config(config, 1, case.cache_length, torch.device("cpu"), torch.float32)
    cache = case.make(params, config)
    zeros = torch.zeros(1, 1, T, 64)
    output = feed(cache, (zeros, zeros, torch.eye(64)[None, None, :T]), cuts)
    return [set((row > 0.01).nonzero().flatten().tolist()) for row in output[0]]  # storages round


@pytest.mark.parametrize("case", [case for case in KINDS if case.tail is None], ids=str)
def test_G4_no_query_loses_a_key_to_a_later_token_of_its_own_call(case):
    T = 30
    one_by_one = attended(case, (1,) * T)
    capacity = case.cache_length if case.evicts else None
    assert one_by_one == [set(visible(p, 1, capacity, case.n_sink, case.window)) for p in range(T)]
    for cuts in [(T,), (1, T - 1), (4, 13, 13), (13, 1, 16), *((T - n, n) for n in (2, 11, 12, 13))]:
        larger = attended(case, cuts)
        assert all(alone <= together for alone, together in zip(one_by_one, larger, strict=True))
        assert larger[cuts[0] :] == one_by_one[cuts[0] :], "after the prefill, calls of any size see the same"


@pytest.mark.parametrize(
    ("heads", "dtype", "static"),
    [
        ((4, 2), torch.float32, False),
        ((4, 2), torch.bfloat16, True),
        ((2, 2), torch.bfloat16, False),
        ((3, 1), torch.float32, True),
    ],
    ids=str,
)
@every_kind
def test_G5_every_row_of_a_ragged_batch_is_its_own_batch_of_one(case, heads, dtype, static):
    case = dataclasses.replace(case, heads=heads, dtype=dtype)
    # rows (None: all), tokens each; a row named with "anew" begins another sequence
    script = [([1], 9), ([0], 3), ([3, 2], 14), (None, 1), (None, 5), (None, 1), ([0, 3], 6), ([2], 1), (None, 1)]
    script += [("anew", [1], 4), ([1, 0], 1), (None, 2), (None, 1)]
    cache, reference, alone = case.cache(5), case.reference(), [case.cache(1) for _ in range(4)]
    cache.start(4)
    reference.start(case.tokens(1, 4)[1], 4)
    for *anew, rows, T in script:
        query, key, value = case.tokens(T, 4 if rows is None else len(rows))
        named = range(4) if rows is None else rows
        if anew:
            plan = cache.plan(0, len(rows), T, rows)
            output = cache.run(plan, query, key, value)
            cache.commit(plan)
            reference.restart(rows)
            for row in rows:
                alone[row].clear()
        else:
            output = call(cache, query, key, value, rows, static and T == 1)
        case.close(output, reference.call(query, key, value, rows))
        for b, row in enumerate(named):
            single = alone[row]
            expected = single(
                query[b : b + 1], key[b : b + 1], value[b : b + 1], torch.zeros(1, T), single.next_token_pos
            )
            case.close(output[b : b + 1], expected.double())
        assert list(cache.row_lengths) == [row.length for row in reference.rows]
        for row, single in enumerate(alone):
            held = [p for p in cache.token_positions()[row, 0].tolist() if p >= 0]
            assert sorted(held) == reference.kept(reference.rows[row])
            assert single.next_token_pos == reference.rows[row].length


@every_kind
def test_G5_continues_all_rows_at_the_position_of_the_longest(case):
    cache = case.cache(3)
    cache.start(3)
    call(cache, *case.tokens(2, 1), rows=[0])
    call(cache, *case.tokens(7, 2), rows=[1, 2])
    assert (cache.row_lengths, cache.next_token_pos, cache.eff_batch_size) == ((2, 7, 7), 7, 3)
    cache(*case.tokens(3, 3), torch.zeros(3, 3), 7)
    assert (cache.row_lengths, cache.next_token_pos) == ((5, 10, 10), 10)


@every_kind
def test_G6_a_second_run_is_bit_identical_to_a_first(case):
    cuts, tokens, used = (9, 1, 1, 7, 1), case.tokens(19), case.cache(4)
    feed(used, case.tokens(30, batch=4), (15, 1, 14))
    for _ in range(2):
        fresh = case.cache(4)
        assert torch.equal(feed(used, tokens, cuts), feed(fresh, tokens, cuts))
        assert used.eff_batch_size == 2
        assert torch.equal(used.token_positions(), fresh.token_positions())
    used.clear()
    assert (used.next_token_pos, used.eff_batch_size, used.get_keys_values()) == (0, None, None)
    assert used.token_positions().shape[-1] == 0
    used.start(3)
    assert (used.next_token_pos, used.eff_batch_size) == (0, 3)


@every_kind
def test_G8_bytes_are_those_allocated_and_never_grow(case):
    for dtype in (torch.float32, torch.bfloat16, None):
        params = dataclasses.replace(case.params(3), dtype=dtype)
        cache = dataclasses.replace(case, n_sink=0, tail=None).make(params)
        bits, parts = cache.size_estimate()

        def allocated(cache=cache):
            return sum(8 * buffer.untyped_storage().nbytes() for buffer in cache.buffers())

        assert bits == sum(parts.values()) == allocated() > 0
        for size in (params, cache.get_params()):
            assert type(cache).size_estimate_apriori(size) == cache.size_estimate_apriori(size) == (bits, parts)
            assert type(cache).size_estimate_apriori(size, type(cache.storage)) == (bits, parts)
        pointers = [buffer.data_ptr() for buffer in cache.buffers()]
        feed(cache, [x.to(cache.dtype) for x in case.tokens(20)], (15, 1, 4))
        assert (cache.size_estimate(), allocated()) == ((bits, parts), bits)
        assert pointers == [buffer.data_ptr() for buffer in cache.buffers()]


class Sizes(TorchDispatchMode):
    """Counts the operations called, the elements of the largest tensor returned, and of all those newly made."""

    def __init__(self):
        super().__init__()
        self.count, self.largest, self.made = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.made += x.numel() if x.untyped_storage().data_ptr() not in known else 0
        return result


@every_kind
def test_G9_nothing_is_read_back_from_the_device(case):
    """On the meta device there is nothing to read: `item`, `tolist`, `nonzero` or `if tensor` would fail."""
    params = dataclasses.replace(case.params(3), device=torch.device("meta"))
    cache = dataclasses.replace(case, n_sink=0).make(params)
    tokens = [x.to("meta") for x in case.tokens(30, 3)]
    for cuts in [(30,), (9, 1, 14, 1)]:
        assert feed(cache, tokens, cuts).shape == (3, sum(cuts), case.heads[0] * D)
    cache.start(3)
    for rows, T in [([1], 9), ([2, 0], 4), (None, 1), (None, 12), ([1, 0], 1)]:
        call(cache, *(x[: 3 if rows is None else len(rows), :, :T] for x in tokens), rows)
    cache.crop(cache.next_token_pos - 1)
    go_on(cache.fork(), [x[:, :, :8] for x in tokens])


@pytest.mark.parametrize(("ragged", "softcap"), [(False, 3.0), (True, None)], ids=["softcap", "ragged"])
@every_kind
def test_G9_a_decode_step_does_as_much_at_any_position_and_copies_no_keys(case, ragged, softcap):
    case = dataclasses.replace(case, heads=(8, 1), slots=90 if case.evicts else 200, softcap=softcap)
    cache, counts = case.cache(3), set()
    cache.start(2)
    call(cache, *case.tokens(100, 1), rows=[0])
    call(cache, *case.tokens(95 if ragged else 100, 1), rows=[1])
    for _ in range(20):
        tokens = case.tokens(1)
        plan = cache.plan(cache.next_token_pos, 2, 1)
        ready = cache.prepare(plan)  # evictions by score are apart: they come once for every `tail` tokens
        with Sizes() as sizes:
            cache.run(ready, *tokens)
        cache.commit(plan)
        counts.add(sizes.count)
        most = max(buffer.numel() for buffer in cache.buffers()) * (1 if case.storage == "default" else 8)
        assert sizes.largest <= most, "keys are not repeated for every head"
        assert softcap or case.storage != "default" or sizes.made < 90 * D, "keys in use are read where they are"
    assert len(counts) == 1


@every_cache
def test_G9_a_chunk_for_some_rows_reads_what_these_have(case):
    case = dataclasses.replace(case, slots=3000)
    cache = case.cache(3)
    cache.start(3)
    call(cache, *case.tokens(10, 1), rows=[1])
    with Sizes() as sizes:
        call(cache, *case.tokens(4, 1), rows=[1])
    assert sizes.made < (3000 if case.storage == "default" else 2 * 2 * 3000 * D)


@pytest.mark.parametrize("case", [c for c in KINDS if c.window != 20 and c.tail != 1], ids=str)
def test_G9_memory_of_a_long_call_grows_with_its_length_only(case):
    """Masks and scores stay far below T x T, whether the call is a prefill or a chunk."""
    T = 3000
    case = dataclasses.replace(case, heads=(1, 1), slots=64 if case.evicts else 2 * T, tail=case.tail and 16)
    cache, tokens = case.cache(1), case.tokens(T, 1)
    for start in (0, T):
        with Sizes() as sizes:
            cache(*tokens, torch.zeros(1, T), start)
        assert sizes.largest <= 512 * (start + T)


@every_kind
def test_G10_a_wrong_call_is_one_clear_error_and_changes_nothing(case):
    cache = case.cache(3)
    with pytest.raises(ValueError, match=r"input_pos=4\b.* 0"):
        feed(cache, case.tokens(2, 2), (2,), start=4)
    feed(cache, case.tokens(9, 2), (8, 1))

    def refuse(error, message, query, key, value, input_pos):
        before = snapshot(cache)
        with pytest.raises(error, match=message):
            cache(query, key, value, torch.zeros(key.shape[0], key.shape[2]), input_pos)
        assert unchanged(cache, before)

    good = case.tokens(2)
    refuse(ValueError, "8.* 9", *good, 8)
    refuse(ValueError, "10.* 9", *good, 10)
    refuse(ValueError, "-1.* 9", *good, -1)
    refuse(ValueError, "4 .*3", *case.tokens(2, 4), 0)
    refuse(ValueError, "3 .*2", *case.tokens(2, 3), 9)
    refuse(ValueError, "1 .*2", *case.tokens(2, 1), 9)
    refuse(ValueError, "0", *case.tokens(0), 9)
    query, key, value = good
    refuse(ValueError, r"query.*\(2, 4, 2, 8\).*\(2, 2, 2, 8\)", query[:, :2], key, value, 9)
    refuse(ValueError, r"query.*\(2, 4, 2, 8\).*\(2, 4, 1, 8\)", query[:, :, :1], key, value, 9)
    refuse(ValueError, r"key.*\(2, 2, 2, 8\).*\(2, 1, 2, 8\)", query, key[:, :1], value[:, :1], 9)
    refuse(ValueError, r"value.*\(2, 2, 2, 8\).*\(2, 2, 2, 4\)", query, key, value[..., :4], 9)
    refuse(ValueError, "float32.*float64", query, key.double(), value.double(), 9)
    refuse(ValueError, "float32.*float64", query.double(), key, value, 9)
    if not case.evicts:
        refuse(IndexError, f"37 .*{ROOM}", *case.tokens(28), 9)
        refuse(IndexError, f"40 .*{ROOM}", *case.tokens(40), 0)


@every_kind
def test_G10_wrong_rows_are_one_clear_error_and_change_nothing(case):
    cache = case.cache(3)
    cache.start(3)
    call(cache, *case.tokens(5, 1), rows=[1])
    call(cache, *case.tokens(2, 2), rows=[0, 2])
    before = snapshot(cache)
    for arguments, message in {
        (5, 1, 1, (3,)): "3.* 3 rows",
        (5, 1, 1, (-1,)): "-1.* 3 rows",
        (5, 2, 1, (1,)): "1.* 2 ",
        (5, 2, 1, (1, 1)): "1, 1",
        (5, 0, 1, ()): "0",
        (0, 0, 1, ()): "0",
        (5, 2, 1, (0, 2)): "input_pos=5.* 2",
        (2, 2, 1, (0, 1)): "input_pos=2.* 5",
    }.items():
        with pytest.raises(ValueError, match=message):
            cache.plan(*arguments[:3], list(arguments[3]))
    for rows, message in {(3,): "3.* 3 rows", (-1,): "-1", (): "1..3", (0, 1, 2, 0): "1..3"}.items():
        with pytest.raises(ValueError, match=message):
            cache.reorder(rows)
    for batch in (0, 4):
        with pytest.raises(ValueError, match=f"{batch} .*3"):
            cache.start(batch)
    for n in (-1, 6):
        with pytest.raises(ValueError, match=rf"{n}\b.* 0..5"):
            cache.crop(n)
    assert unchanged(cache, before)


@every_cache
def test_G10_a_call_that_fails_midway_leaves_the_cache_empty(case, monkeypatch):
    cache = case.cache()
    feed(cache, case.tokens(9), (9,))
    for owner, name in ((cache.mha, "attend"), (ops, "run_tails")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(cache, case.tokens(4), (4,), 9)
    assert cache.next_token_pos == 0


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("cache_length", 0), ("cache_length", -3)])
@every_cache
def test_G10_sizes_that_cannot_be(case, name, value):
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        case.make(dataclasses.replace(case.params(2), **{name: value}))


@every_cache
def test_limits_of_a_call(case):
    cache = case.cache()
    assert cache.max_tokens_forward == case.cache_length
    assert cache.max_prefill_length == (None if case.evicts else case.cache_length)
    assert (cache.batch_size, cache.n_query_groups, cache.cache_length) == (2, 2, case.cache_length)
    assert (cache.dtype, cache.device) == (torch.float32, torch.device("cpu"))
    assert cache.get_params() == case.params(2)
    assert not cache.update_requires_attn_weights()
