"""Caches as people name them, and the helpers that others test their own caches with."""

import copy
import pickle
import sys

import pytest
import torch
from tiny import tiny_gpt

import litgpt.kvcache.spec
from litgpt.config import Config
from litgpt.kvcache import CacheSpec, DenseKVCache, KVCacheParams, LastRecentlyInsertedKVCache, PositionalKVCache
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.policies.lastrec import LastRecentPolicy
from litgpt.kvcache.storages import STORAGES
from litgpt.kvcache.testing import (
    KV_CACHE_NAMES,
    create_kv_cache,
    random_attn_weights,
    random_keys_values,
    random_tensor,
    tensor_is_simple,
)

CONFIG = Config(n_layer=3, n_embd=32, n_head=4, n_query_groups=2, block_size=50)
PARAMS = KVCacheParams(3, 2, 7, 5, 4, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("name", KV_CACHE_NAMES)
def test_a_cache_made_by_name_has_the_parameters_asked_for(name):
    for each in (name, name.split("-")[0]):
        cache = create_kv_cache(each, PARAMS, block_idx=2)
        assert cache.get_params() == PARAMS
        assert cache.block_idx == 2
        query = random_tensor(PARAMS, 4, is_query=True)
        assert cache(query, *random_keys_values(PARAMS, 4), torch.zeros(3, 4), 0).shape == (3, 4, 4 * 5)


def test_random_inputs_have_the_shapes_and_dtype_of_a_cache():
    for x in (random_tensor(PARAMS, 6), *random_keys_values(PARAMS, 6)):
        assert (x.shape, x.dtype) == ((3, 2, 6, 5), torch.bfloat16)
    assert random_tensor(PARAMS, 6, is_query=True).shape == (3, 4, 6, 5)
    weights = random_attn_weights(PARAMS, 6)
    assert weights.shape == (3, 4, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, dtype=torch.bfloat16))


def test_a_simple_tensor_repeats_its_last_dimension():
    positions = torch.arange(5).expand(2, 3, 5)
    assert tensor_is_simple(positions)
    different = positions.clone()
    different[1, 2, 4] = 0
    assert not tensor_is_simple(different)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        tensor_is_simple(torch.arange(5))


SPECS = [
    CacheSpec(),
    CacheSpec("dense", cache_length=40),
    CacheSpec("lastrec", cache_length=20, n_sink=4),
    CacheSpec("lastrec", "default", n_sink=0),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_spec_is_a_value_that_text_and_numbers_give_back(spec):
    text, arguments = str(spec), dict(spec.arguments)
    assert CacheSpec.parse(text, spec.cache_length, **arguments) == spec
    assert CacheSpec.parse(f"{spec.policy}-{spec.storage}", spec.cache_length, **arguments) == spec
    described = spec.describe()
    assert CacheSpec.parse(described.pop("kv_cache"), **described) == spec
    assert CacheSpec.parse(spec) == spec
    assert eval(repr(spec)) == spec
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
    assert len({spec, CacheSpec.parse(text, spec.cache_length, **arguments)}) == 1
    with pytest.raises(AttributeError):
        spec.policy = "dense"


def test_specs_that_differ_in_anything_are_different():
    assert len({*SPECS, CacheSpec("lastrec", cache_length=20, n_sink=5), CacheSpec("lastrec", cache_length=21)}) == 6


@pytest.mark.parametrize("name", KV_CACHE_NAMES)
def test_every_policy_and_storage_can_be_named(name):
    policy, storage = name.split("-", 1)
    assert (policy in POLICIES, storage in STORAGES) == (True, True)
    spec = CacheSpec.parse(name)
    assert (spec.policy, spec.storage) == (policy, storage)
    assert str(spec) == name.removesuffix("-default")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h2o-torch-quantized8", CacheSpec("h2o", "int8")),
        ("h2o-vlen-torch-quantized4", CacheSpec("h2o", "int4", value_norm=True)),
        ("h2o-orig-default", CacheSpec("h2o")),
        ("lastrec-bnb-quantized4", CacheSpec("lastrec", "int4")),
        ("dense-bnb-quantized8", CacheSpec("dense", "int8")),
        ("smart-lastrec-torch-quantized8", CacheSpec("lastrec", "int8", n_sink=4)),
    ],
)
def test_names_that_others_have_for_caches_mean_those_here(name, expected):
    assert CacheSpec.parse(name) == expected


def test_what_is_given_beside_a_spec_replaces_what_it_says():
    spec = CacheSpec("lastrec", cache_length=20, n_sink=4)
    assert CacheSpec.parse(spec, 30) == CacheSpec("lastrec", cache_length=30, n_sink=4)
    assert CacheSpec.parse(spec, n_sink=2) == CacheSpec("lastrec", cache_length=20, n_sink=2)


def test_caches_of_all_layers():
    caches = CacheSpec("lastrec", cache_length=20, n_sink=4).create(CONFIG, 2, dtype=torch.bfloat16)
    assert [cache.block_idx for cache in caches] == [0, 1, 2]
    assert all(isinstance(cache, LastRecentlyInsertedKVCache) for cache in caches)
    assert {(c.batch_size, c.policy, c.dtype) for c in caches} == {(2, LastRecentPolicy(20, 4), torch.bfloat16)}
    for name, kind in (("dense-default", DenseKVCache), ("lastrec-default", LastRecentlyInsertedKVCache)):
        assert {(type(c), c.cache_length) for c in CacheSpec.parse(name).create(CONFIG, 1)} == {(kind, 50)}


def test_caches_for_a_model_are_where_its_layers_are_and_compute_as_it_does():
    model = tiny_gpt().to(torch.float64)
    model.layer_devices = [torch.device("cpu"), torch.device("meta")]
    caches = CacheSpec("lastrec", cache_length=8).create(model, 3)
    assert [(c.device.type, c.dtype, c.batch_size) for c in caches] == [
        ("cpu", torch.float64, 3),
        ("meta", torch.float64, 3),
    ]
    assert all(cache.mha is model.mha for cache in caches)
    devices = [torch.device("meta"), torch.device("cpu")]
    assert [c.device for c in CacheSpec().create(model, 1, devices)] == devices


def test_the_size_is_known_before_anything_is_allocated():
    for spec in SPECS:
        caches = spec.create(CONFIG, 3, dtype=torch.bfloat16)
        total, parts = spec.size(CONFIG, 3, torch.bfloat16)
        assert total == sum(parts.values()) == sum(cache.size_estimate()[0] for cache in caches)


def test_a_budget_is_for_every_policy_that_evicts():
    for name in ("lastrec", "h2o"):
        caches = CacheSpec.parse(name, cache_length=12, budget=[3, 2, 1]).create(CONFIG, 1)
        assert [cache.cache_length for cache in caches] == [18, 12, 6]
    with pytest.raises(ValueError, match="no argument 'budget'"):
        CacheSpec("dense", budget="pyramid")


def test_layers_with_a_window_keep_its_tokens_whatever_the_policy(monkeypatch):
    monkeypatch.setattr(litgpt.kvcache.spec, "WINDOW_SLACK", 3)
    config = Config(
        n_layer=4, n_embd=32, n_head=4, block_size=50, sliding_window_size=8, sliding_window_indices=[1, 1, 0, 1]
    )
    window = LastRecentPolicy(11)
    for asked in (CacheSpec("lastrec", cache_length=20, n_sink=4), CacheSpec(), CacheSpec("dense", cache_length=12)):
        full = asked.make_policy(asked.cache_length or 50)
        assert [cache.policy for cache in asked.create(config, 1)] == [window, window, full, window]
    for asked in (CacheSpec("lastrec", cache_length=6, n_sink=2), CacheSpec("dense", cache_length=11)):
        assert [cache.policy for cache in asked.create(config, 1)] == [asked.make_policy(asked.cache_length)] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheSpec("newest"), "no key-value cache is called 'newest'.* dense, .*lastrec"),
        (lambda: CacheSpec.parse("snapvk"), r"'snapvk' \(did you mean snapkv\?\)"),
        (lambda: CacheSpec.parse("kivi"), r"'kivi' \(dense-kivi is one\)"),
        (lambda: CacheSpec.parse("lastrec-int9"), "'int9'.* default"),
        (lambda: CacheSpec.parse(""), "''.* dense, .*lastrec"),
        (lambda: CacheSpec("dense", n_sink=2), "'dense' has no argument 'n_sink': it has no arguments"),
        (lambda: CacheSpec("lastrec", sinks=2), "'lastrec' has no argument 'sinks': its arguments are n_sink"),
        (lambda: CacheSpec("lastrec", cache_length="9"), "cache_length must be a whole number of slots, got '9'"),
        (lambda: CacheSpec("lastrec", cache_length=0).create(CONFIG, 1), "1..50.* 0$"),
        (lambda: CacheSpec("dense", cache_length=51).create(CONFIG, 1), "1..50.* 51$"),
        (lambda: CacheSpec("lastrec", cache_length=20, n_sink=20).create(CONFIG, 1), "n_sink.*19.* 20$"),
        (lambda: CacheSpec("lastrec").create(CONFIG, 0), "batch_size.* 0$"),
        (lambda: CacheSpec("no_such_module:Policy"), "no_such_module:Policy.* No module named 'no_such_module'"),
        (lambda: CacheSpec("litgpt.kvcache:Nothing"), "'Nothing' of the module 'litgpt.kvcache' is no cache policy"),
        (lambda: CacheSpec("litgpt.kvcache:KVCache"), "'KVCache' of the module 'litgpt.kvcache' is no cache policy"),
    ],
)
def test_caches_that_cannot_be_are_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


OWN = """
from dataclasses import dataclass
import torch
from litgpt.kvcache import PositionalPolicy, register_policy

@register_policy("halves")
@dataclass(frozen=True)
class Halves(PositionalPolicy):
    head: float = 0.5

    @property
    def n_sink(self):
        return int(self.head * self.cache_length)

    def slots(self, positions):
        return torch.where(positions < self.n_sink, positions, self.n_sink + (positions - self.n_sink) % self.reach)
"""


def test_a_policy_of_a_module_in_the_current_folder_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "my_policies.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    try:
        asked = CacheSpec.parse("my_policies:Halves", cache_length=10, head=0.3)
        (cache, *_) = asked.create(CONFIG, 1)
        assert type(cache) is PositionalKVCache
        assert (cache.policy.n_sink, cache.policy.reach) == (3, 7)
        assert CacheSpec.parse(str(asked), 10, head=0.3) == asked
        assert CacheSpec.parse("my_policies:Halves-int8", 10, head=0.3).storage == "int8"
        assert CacheSpec.parse("halves", 10, head=0.3).create(CONFIG, 1)[0].policy == cache.policy
        dotted = CacheSpec.parse("my_policies.Halves-int8", 10, head=0.3)
        assert (dotted.policy_class, dotted.storage) == (asked.policy_class, "int8")
        assert CacheSpec.parse(str(dotted), 10, head=0.3) == dotted
        with pytest.raises(ValueError, match="no argument 'tail': its arguments are head"):
            CacheSpec("halves", tail=3)
    finally:
        POLICIES.pop("halves", None)
        sys.modules.pop("my_policies", None)
