"""Many tokens at once in caches that score them by attention weights: one kernel does what single calls do, in bfloat16 bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt

from litgpt.kernels import ops
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.policies.h2o import H2OPolicy
from litgpt.kvcache.score import prepare_all
from litgpt.kvcache.score_kernels import can_look

HEADS = {"n_head": 6, "n_query_groups": 2, "head_size": 16, "n_embd": 96}
needs_kernel = pytest.mark.skipif(not ops.available(), reason="no kernels on this machine")


def caches(name, rows=1, cap=None, count=2, dtype=torch.bfloat16, **args):
    gpt = tiny_gpt(**VOCABULARY, **HEADS, n_layer=1, block_size=1024, attention_logit_softcapping=cap).to(dtype)
    spec = CacheSpec.parse(CacheSpec.parse(name), **args)
    length = spec.length_for(gpt.config)
    make = lambda: spec.create_layer(gpt.config, rows, 0, length, torch.device("cpu"), dtype, mha=gpt.mha)  # noqa: E731
    return [make() for _ in range(count)]


def heads(rows, T, dtype=torch.bfloat16):
    sizes = (HEADS["n_head"], HEADS["n_query_groups"], HEADS["n_query_groups"])
    return [(2 * torch.randn(rows, T, n, HEADS["head_size"])).to(dtype).transpose(1, 2) for n in sizes]


@torch.no_grad()
def call(cache, own, sinks=None):
    plan = cache.plan(cache.next_token_pos, *own[0].shape[::2])
    output = cache.run(plan, *own, None, sinks)
    cache.commit(plan)
    return output


def without_kernel(monkeypatch, cache, own, sinks=None):
    with monkeypatch.context() as patch:
        by_torch(patch)
        return call(cache, own, sinks)


def by_torch(patch):
    """Without the kernels that look and choose."""
    for name in ("can_run_tails", "can_look", "can_choose_slots"):
        patch.setattr(ops, name, lambda *_: False)


def assert_equal_states(first, second):
    dtype, first, second = first.dtype, first.state(), second.state()
    assert first.keys() == second.keys()
    for name, x in first.items():
        if torch.is_tensor(x):
            assert_equal(x, second[name], dtype)
        else:
            assert x == second[name], name


def assert_equal(x, y, dtype):
    """To the last bit, but for caches in float32, where single calls take sums in another order."""
    error = 1e-5 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(x, y, rtol=error, atol=error)


@needs_kernel
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("h2o", {"cache_length": 64}),
        ("h2o", {"cache_length": 150, "tail": 40, "n_sink": 0, "recent": 1}),
        ("h2o", {"cache_length": 20, "tail": 1}),
        ("snapkv", {"cache_length": 64}),
        ("snapkv", {"cache_length": 150, "tail": 40, "window": 7, "pool": 3}),
        ("snapkv", {"cache_length": 40, "tail": 1, "pool": 1, "recent": 3}),
    ],
)
@pytest.mark.parametrize(("rows", "cap", "with_sinks"), [(1, None, False), (3, 20.0, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_scores_and_evictions_are_those_of_single_steps(monkeypatch, name, args, rows, cap, with_sinks, dtype):
    torch.manual_seed(0)
    ours, single = caches(name, rows, cap, dtype=dtype, **args)
    sinks, used, run = torch.randn(HEADS["n_head"]).to(dtype) if with_sinks else None, [], ops.run_tails
    monkeypatch.setattr(ops, "run_tails", lambda *args: used.append(1) or run(*args))
    for T in (11, 90, 1, 1, 47, 3, 130):
        own = heads(rows, T, dtype)
        assert_equal(call(ours, own, sinks), without_kernel(monkeypatch, single, own, sinks), dtype)
        assert_equal_states(ours, single)
    longest = ours.policy.tail
    assert bool(used) == (dtype == torch.float32 or longest <= ops.MAX_QUERIES or ops.multiplies_fast())


@needs_kernel
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("h2o", {"cache_length": 32, "tail": 4}),
        ("h2o-int8", {"cache_length": 32, "tail": 4}),
        ("h2o-int4", {"cache_length": 40, "tail": 9, "n_sink": 0}),
        ("snapkv-k8v4", {"cache_length": 32, "tail": 4, "window": 7}),
        ("snapkv", {"cache_length": 40, "tail": 1}),
    ],
)
def test_looks_while_decoding(monkeypatch, name, args):
    """Those of all caches by one call of a kernel."""
    torch.manual_seed(0)
    pair = caches(name, 3, cap=20.0, count=3, **args)
    sinks, looks, run = torch.randn(HEADS["n_head"]).bfloat16(), [], ops.run_looks
    monkeypatch.setattr(ops, "run_looks", lambda own, dtype: looks.append(len(own)) or run(own, dtype))
    for cache in pair:
        cache.start(3)
    own, sizes = heads(1, 57), [20, 17, 20]
    for cache in pair:
        with torch.no_grad():
            plan = cache.plan(0, 3, sizes, [0, 1, 2])
            cache.run(plan, *own, None, sinks)
        cache.commit(plan)
    for _ in range(30):
        own = heads(3, 1)
        with torch.no_grad():
            ready = prepare_all(pair[:2], [c.plan(c.next_token_pos, 3, 1) for c in pair[:2]], [sinks] * 2)
            outputs = [c.run(plan, *own, None, sinks) for c, plan in zip(pair, ready, strict=False)]
        for cache, plan in zip(pair, ready, strict=False):
            cache.commit(plan)
        expected = without_kernel(monkeypatch, pair[2], own, sinks)
        for output, cache in zip(outputs, pair, strict=False):
            assert torch.equal(output, expected)
            assert_equal_states(cache, pair[2])
    assert max(looks) >= 2  # of both caches


@needs_kernel
def test_gradients_keep_looks_by_torch():
    (cache,) = caches("h2o", count=1, cache_length=32)
    assert not can_look(cache, None)
    with torch.no_grad():
        assert can_look(cache, None)
        assert not can_look(cache, torch.zeros(HEADS["n_head"]))  # sinks in float32


@needs_kernel
@pytest.mark.parametrize("kept", [1, 20, 60])
def test_the_best_slots_by_a_kernel(monkeypatch, kept):
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 64).round(decimals=1)  # with equal ones
    scores[0, 0, 5:40] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0]).repeat(7)
    policy = H2OPolicy(64, tail=64 - kept, n_sink=kept // 3, recent=max(1, kept // 4))
    tokens = SimpleNamespace(shape=scores.shape, slot_state=scores[None])
    found = policy.best(tokens)
    by_torch(monkeypatch)
    assert torch.equal(found, policy.best(tokens))


@needs_kernel
@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_rows_of_their_own_lengths(monkeypatch, name):
    torch.manual_seed(0)
    pair = caches(name, 3, cache_length=32, tail=4)
    for cache in pair:
        cache.start(3)
    for sizes in ([40, 7, 21], [25, 30, 25], [9, 50, 8]):
        own, outputs = heads(1, sum(sizes)), []
        for cache, usable in zip(pair, (True, False), strict=True):
            with monkeypatch.context() as patch, torch.no_grad():
                if not usable:
                    by_torch(patch)
                plan = cache.plan(cache.next_token_pos, 3, sizes, [0, 1, 2])
                outputs.append(cache.run(plan, *own))
                cache.commit(plan)
        assert torch.equal(*outputs)
        assert_equal_states(*pair)


@needs_kernel
@pytest.mark.parametrize("name", ["h2o", "snapkv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_noted_is_what_single_tokens_find(monkeypatch, name, dtype):
    torch.manual_seed(0)
    ours, single = caches(name, cache_length=32, tail=4, dtype=dtype)
    own = heads(1, 41, dtype)
    for cache in (ours, single):
        call(cache, own)
    own = heads(1, 30, dtype)
    with torch.no_grad():
        output, steps = ours.run_noted(*own, None)
    begin = 0
    for size, fields, positions in steps:
        part = [x[:, :, begin : begin + size] for x in own]
        with torch.no_grad():
            single.prepare(single.plan(single.next_token_pos, 1, size))
        assert fields == single.row_fields
        assert torch.equal(positions, single.token_positions())
        assert_equal(output[:, begin : begin + size], without_kernel(monkeypatch, single, part), dtype)
        begin += size
    assert begin == 30
    assert len(steps) > 5


def test_policies_that_change_scores_of_others_are_not_taken_for_them():
    class Own(H2OPolicy):
        def scores(self, tokens):
            return -super().scores(tokens)

    assert H2OPolicy(32).pooled_by_kernels == 1
    assert Own(32).pooled_by_kernels is None
    assert H2OPolicy(32, run=2).pooled_by_kernels is None
    assert H2OPolicy(32, value_norm=True).pooled_by_kernels is None
    assert CacheSpec("qh2o").policy_class(32).pooled_by_kernels is None
