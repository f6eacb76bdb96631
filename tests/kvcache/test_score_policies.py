"""Policies that score tokens: guarantee G11, evictions are those of written-out attention; their options; models with them."""

import inspect
import json
import math
import sys
from dataclasses import dataclass

import pytest
import torch
from tiny import tiny_gpt

from litgpt.config import Config
from litgpt.kvcache import CacheSpec, KVCacheParams
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.policies.lastrec import LastRecentPolicy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.score import ScoreKVCache
from litgpt.kvcache.testing import create_kv_cache

from .cases import D, feed, follow, score_defaults
from .score_reference import LOOKING, SCORES, ScoreReference, h2o_value_norm

NAMES = [name for name, policy in POLICIES.items() if issubclass(policy, ScorePolicy)]


def pair(name, slots, tail, score=None, n_sink=None, recent=None, run=1, dtype=torch.float32, softcap=None, **args):
    """A cache and its reference."""
    config = Config(
        n_layer=2, n_embd=4 * D, n_head=4, n_query_groups=2, block_size=4096, attention_logit_softcapping=softcap
    )
    params = KVCacheParams.from_config(config, 2, slots, dtype=dtype)
    cache = create_kv_cache(name, params, 1, config, tail=tail, n_sink=n_sink, recent=recent, run=run, **args)
    sinks, newest = score_defaults(name, slots - tail)
    reference = ScoreReference(
        1 / math.sqrt(D),
        score or SCORES[name],
        slots,
        tail,
        sinks if n_sink is None else n_sink,
        newest if recent is None else recent,
        name in LOOKING,
        run,
        softcap,
        layer=1,
    )
    return cache, reference


def draw(T, dtype=torch.float32, batch=2):
    return tuple(2 * torch.randn(batch, heads, T, D).to(dtype) for heads in (4, 2, 2))


def agree(cache, reference, tokens, cuts):
    """The outputs are the same, and so is what is left in every row and head."""
    found, expected = feed(cache, tokens, cuts), follow(reference, tokens, cuts)
    tolerance = 1e-5 if cache.dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0 if tolerance < 1e-4 else 0.05)
    for b, row in enumerate(reference.rows):
        for g in range(2):
            assert cache.token_positions()[b, g, : len(row.kept[g])].tolist() == row.kept[g]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", [(30, *(1,) * 170), (90, 110), (150, 7, 43)], ids=len)
@pytest.mark.parametrize(("slots", "tail"), [(50, 1), (110, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_G11_evictions_are_those_of_attention_written_out(name, slots, tail, cuts, dtype):
    agree(*pair(name, slots, tail, dtype=dtype), draw(200, dtype), cuts)


@pytest.mark.parametrize(
    "options", [{"n_sink": 0}, {"n_sink": 7, "recent": 9}, {"recent": 1}, {"run": 4}, {"softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_first_and_newest_tokens_stay_and_runs_go_together(name, options):
    agree(*pair(name, 30, 6, **options), draw(100), (20, *(1,) * 30, 50))


def test_h2o_may_weigh_by_the_norms_of_values():
    tokens = draw(100)
    tokens[2].mul_(torch.rand(100)[:, None] ** 4)
    plain, weighed = pair("h2o", 30, 6), pair("h2o", 30, 6, h2o_value_norm, value_norm=True)
    agree(*weighed, tokens, (20, 80))
    feed(plain[0], tokens, (20, 80))
    assert not torch.equal(plain[0].token_positions(), weighed[0].token_positions())


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_qh2o_prefers_tokens_that_the_storage_keeps_well(storage):
    """Keys with one large number are coarsely quantised; they differ in nothing that attention sees."""
    config = Config(n_layer=2, n_embd=4 * 64, n_head=4, n_query_groups=2, block_size=4096)
    params = KVCacheParams.from_config(config, 1, 60, dtype=torch.float32)
    query, key, value = torch.randn(1, 4, 200, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
    query[..., 1] = 0
    coarse = torch.arange(200) % 2 == 0
    key[:, :, coarse, 1] = 300.0
    kept = {}
    for name, args in (("h2o", {}), ("qh2o", {}), ("qh2o", {"error_weight": 10.0})):
        cache = create_kv_cache(f"{name}-{storage}", params, 1, config, tail=4, recent=1, n_sink=0, **args)
        feed(cache, (query, key, value), (120, 80))
        kept[name, len(args)] = coarse[cache.token_positions()].float().mean()
    assert kept["h2o", 0] > kept["qh2o", 0] > kept["qh2o", 1]
    assert kept["qh2o", 1] < 0.1


def test_snapkv_looks_through_its_window_and_pools():
    score = lambda row, g, reference: SCORES["snapkv"](row, g, reference, 9, 3)  # noqa: E731
    agree(*pair("snapkv", 30, 6, score, window=9, pool=3), draw(100), (20, 30, 50))


def test_random_keeps_another_sample_for_another_seed_row_by_row_the_same():
    tokens = draw(300, batch=1)
    kept = []
    for seed in (0, 0, 1):
        cache, _ = pair("random", 60, 1, seed=seed)
        feed(cache, tokens, (300,))
        kept.append(cache.token_positions()[0])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0][0], kept[0][1])
    assert 100 < kept[0].float().mean() < 200  # of the whole sequence


@dataclass(frozen=True)
class Equal(ScorePolicy):
    def scores(self, tokens):
        return torch.zeros(tokens.shape)


@dataclass(frozen=True)
class NotANumber(ScorePolicy):
    def scores(self, tokens):
        return torch.where(tokens.positions % 2 == 0, torch.nan, 0.0)


def test_of_equal_scores_the_newer_token_stays_and_none_beats_not_a_number():
    cache, _ = pair(f"{__name__}:Equal", 20, 4, list, n_sink=2, recent=1)
    feed(cache, draw(50), (50,))
    assert cache.token_positions()[0, 0].tolist() == [0, 1, *range(36, 50)]
    cache, _ = pair(f"{__name__}:NotANumber", 20, 4, list, n_sink=2, recent=1)
    feed(cache, draw(50), (50,))
    assert cache.token_positions()[0, 0].tolist() == [0, 1, *range(23, 50, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_policy_sums_up_is_float32_whatever_the_model_becomes(name):
    cache, _ = pair(name, 30, 6)
    feed(cache, draw(60), (30, 30))
    before = dict(cache.policy_state.named_buffers())
    cache.to(torch.bfloat16)
    assert cache.dtype == torch.bfloat16
    for each, buffer in cache.policy_state.named_buffers():
        assert each == "queries" or torch.equal(buffer, before[each])
    feed(cache, draw(60, torch.bfloat16), (30, 30))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*(f"{name}-default" for name in NAMES), "dense-int4"])
def test_numbers_do_not_depend_on_torchs_default_dtype(name, default):
    size = 48  # of heads, as in no other test: constants are made once
    params = KVCacheParams(2, 2, 40 if "dense" in name else 24, size, 4, None, torch.float32)
    tokens, found = [torch.randn(2, heads, 40, size) for heads in (4, 2, 2)], []
    for dtype in (default, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            cache = create_kv_cache(name, params, **({"tail": 6} if name != "dense-int4" else {}))
            found.append((feed(cache, tokens, (20, 13, 7)), cache.token_positions()))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_a_short_file(name):
    lines = len(inspect.getsource(sys.modules[POLICIES[name].__module__]).splitlines())
    assert lines < (60 if POLICIES[name](64).n_queries else 40)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tail": 0}, r"tail.*1..29.*30.* 0$"),
        ({"tail": 30}, r"tail.*1..29.* 30$"),
        ({"tail": 2.5}, r"tail.* 2.5$"),
        ({"tail": 6, "n_sink": 24}, r"n_sink.*0..23.* 24$"),
        ({"tail": 6, "n_sink": 20, "recent": 5}, r"recent.*1..4.* 5$"),
        ({"recent": 0}, r"recent.* 0$"),
        ({"run": 0}, r"run must be at least 1.* 0$"),
        ({"cache_length": 1}, r"cache_length of at least 2.* 1$"),
        ({"name": "snapkv", "pool": 4}, r"pool.*odd.* 4$"),
        ({"name": "snapkv", "window": 0}, r"window.* 0$"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(args, message):
    name, length = args.pop("name", "h2o"), args.pop("cache_length", 30)
    with pytest.raises(ValueError, match=message):
        CacheSpec(name, cache_length=length, **args).create(Config(n_layer=1, n_embd=32, n_head=4, block_size=50), 1)


def test_layers_with_a_window_have_caches_of_positions():
    config = Config(
        n_layer=2, n_embd=32, n_head=4, block_size=500, sliding_window_size=8, sliding_window_indices=[1, 0]
    )
    for length in (300, 40):
        window, full = CacheSpec("h2o", cache_length=length).create(config, 1)
        assert window.policy == LastRecentPolicy(min(length, 72))
        assert isinstance(full, ScoreKVCache)
    params = KVCacheParams.from_config(config, 1, 40)
    with pytest.raises(ValueError, match="layer 0 has a sliding window"):
        create_kv_cache("h2o", params, 0, config)


def kept_by_a_model(name, idx, cuts, sinks):
    """What is left in every layer of a model with sink logits around `sinks`."""
    torch.manual_seed(0)
    model = tiny_gpt(attention_sinks=True, n_layer=2)
    for block in model.transformer.h:
        block.attn.sinks.data.uniform_(sinks - 4, sinks + 4)
    model.assign_kv_caches(CacheSpec(name, cache_length=24, tail=5).create(model, 1))
    for part in idx.split(cuts, 1):
        model(part, model.next_token_pos)
    return [cache.token_positions().tolist() for cache in model.kv_caches()]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_sink_logits_gives_them_to_its_policies(name):
    idx = torch.randperm(100)[None, :60]
    one_by_one, at_once = (kept_by_a_model(name, idx, (10, *rest), 2) for rest in [(1,) * 50, (50,)])
    assert one_by_one == at_once
    if name == "h2o":
        assert kept_by_a_model(name, idx, (10, *(1,) * 50), -99) != one_by_one


def test_a_budget_distributes_slots_over_the_layers_without_a_window():
    config = Config(
        n_layer=5, n_embd=32, n_head=4, block_size=500, sliding_window_size=8, sliding_window_indices=[0, 1, 0, 0, 0]
    )

    def lengths(**args):
        spec = CacheSpec("h2o", cache_length=120, **args)
        caches = spec.create(config, 1)
        assert spec.size(config, 1)[0] == sum(cache.size_estimate()[0] for cache in caches)
        return [cache.cache_length for cache in caches]

    assert lengths() == lengths(budget="uniform") == [120, 72, 120, 120, 120]
    assert lengths(budget="pyramid") == [234, 72, 158, 82, 6]
    least = {"n_sink": 4, "recent": 8, "tail": 4}  # 16 slots
    assert lengths(budget="pyramid", **least) == [224, 72, 155, 85, 16]
    assert lengths(budget=[3, 1, 1, 1]) == [240, 72, 80, 80, 80]
    for budget in ("funnel", [1, 2], [1, 1, 1, 0], 3):
        with pytest.raises(ValueError, match="budget.*'pyramid', 'scores', or 4 positive numbers.*got"):
            lengths(budget=budget)
    with pytest.raises(ValueError, match="layer 0 680 slots.* 2..500"):
        CacheSpec("h2o", cache_length=340, budget=(2, 1, 1, 0.00001)).create(config, 1)
    with pytest.raises(ValueError, match="layer 4 40 slots.* 44..500"):
        CacheSpec("h2o", cache_length=100, budget=(3, 3, 3, 1), recent=40, n_sink=0, tail=4).create(config, 1)
    with pytest.raises(ValueError, match="no argument 'budget'"):
        CacheSpec("dense", budget="pyramid")
    spec = CacheSpec("h2o", budget=[1, 2])
    assert json.loads(json.dumps(spec.describe())) == spec.describe()  # as files of sessions have it
    assert eval(repr(spec)) == spec == CacheSpec.parse(spec.describe().pop("kv_cache"), budget=[1, 2])


@pytest.mark.parametrize("name", ["lastrec", "h2o", "snapkv", "h2o-int8"])
def test_a_pyramid_has_its_slots_where_its_top_would_be_too_small(name):
    config = Config(n_layer=4, n_embd=32, n_head=4, block_size=500)
    for cache_length in range(2, 41):
        caches = CacheSpec.parse(name, cache_length=cache_length, budget="pyramid").create(config, 1)
        lengths = [cache.cache_length for cache in caches]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] == max(2, round(cache_length / 20))
        assert abs(sum(lengths) - 4 * cache_length) <= 2  # rounded


def test_a_model_decodes_with_layers_of_different_budgets():
    model = tiny_gpt(n_layer=3)
    model.assign_kv_caches(CacheSpec("snapkv", cache_length=40, budget="pyramid", tail=1).create(model, 2))
    with torch.no_grad():
        for part in torch.randint(100, (2, 90)).split((50, *(1,) * 40), 1):
            model(part, model.next_token_pos)
    assert [cache.current_length for cache in model.kv_caches()] == [78, 40, 2]
