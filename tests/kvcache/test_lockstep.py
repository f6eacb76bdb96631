"""Caches of several layers share the numbers of their rows, until one of them is changed by itself."""

import pytest
import torch
from tiny import create_kv_caches, tiny_gpt

from litgpt.kvcache import CacheSpec
from litgpt.kvcache.baselines import DenseKVCache
from litgpt.kvcache.layers import LayerCaches

IDX = torch.arange(3, 23).view(2, 10)
NAMES = {"dense": 30, "lastrec": 8, "h2o": 12, "dense-int8": 30, "dense-kivi": 30}


def model_with(name="dense", cache_length=None, caches=None):
    """A model with three tokens in each of two rows, after two calls."""
    model = tiny_gpt(n_layer=3)
    if caches is None:
        args = {"group": 16, "window": 32} if name == "dense-kivi" else {}
        caches = create_kv_caches(name, model.config, 2, cache_length or NAMES[name], **args)
    model.assign_kv_caches(caches)
    model(IDX[:, :2], 0), model(IDX[:, 2:3], 2)
    return model, caches


def alone(cache, position, T=1):
    """Calls one cache."""
    query, key, value = (torch.zeros(2, heads, T, 16) for heads in (4, 2, 2))
    cache(query, key, value, torch.zeros(2, T), position)


def refill(cache):
    fields = tuple(tuple(1 for _ in field) for field in cache.row_fields)
    cache.refill(fields, *(torch.zeros(2, 2, 1, 16) for _ in range(2)))


CHANGES = {
    "clear": lambda cache: cache.clear(),
    "start": lambda cache: cache.start(2),
    "rewind": lambda cache: cache.rewind([1, 1]),
    "rewind a row": lambda cache: cache.rewind([0, 1]),
    "crop": lambda cache: cache.crop(2),
    "reorder": lambda cache: cache.reorder([1]),
    "load_state": lambda cache: cache.load_state(cache.empty_copy().state()),
    "load_state_of_row": lambda cache: (cache.rewind([0, 3]), cache.load_state_of_row(1, cache.state_of_row(0))),
    "call": lambda cache: alone(cache, 3),
    "another prompt": lambda cache: alone(cache, 0, 5),
    "refill": refill,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_cache_that_is_changed_by_itself_leaves_the_others_as_they_are_and_is_noticed(name, change):
    model, caches = model_with(name)
    others = [(cache, cache.row_fields) for cache in (caches[0], caches[2])]
    CHANGES[change](caches[1])
    assert all(cache.row_fields == fields for cache, fields in others)
    lengths = caches[1].row_lengths
    if len(lengths) == 2 and max(lengths) == 3:
        model(IDX[:, 3:4], 3)
        assert [cache.row_lengths for cache in caches] == [(4, 4), tuple(n + 1 for n in lengths), (4, 4)]
        return
    with pytest.raises(ValueError, match=r"\d"):
        model(IDX[:, 3:4], 3)
    assert all(cache.row_fields == fields for cache, fields in others)


@torch.inference_mode()
def test_a_call_of_all_caches_is_noted_in_each():
    for name in NAMES:
        model, caches = model_with(name)
        assert len({id(cache.row_fields) for cache in caches}) == 1, "they share their numbers"
        for position in range(3, 10):
            model(IDX[:, position : position + 1], position)
            assert [cache.row_lengths for cache in caches] == [(position + 1,) * 2] * 3


@torch.inference_mode()
def test_a_change_during_a_call_is_not_undone_for_the_others():
    model, caches = model_with()
    model.set_start_of_layer_hook(lambda x, layer, position: caches[2].clear() if layer == 3 else None)
    model(IDX[:, 3:4], 3)
    assert [cache.row_lengths for cache in caches] == [(4, 4)] * 3  # a call says what all rows have after it
    caches[2].clear()
    assert caches[0].row_lengths == (4, 4)


@torch.inference_mode()
def test_a_cache_of_two_models_takes_no_others_along():
    model, caches = model_with()
    single = LayerCaches(caches[:1])
    plans, _ = single.plan(3, [1, 1], None, False, False, 100)
    tokens = [torch.zeros(2, heads, 1, 16) for heads in (4, 2, 2)]
    single.run(plans, lambda plans: caches[0].run(plans[0], *tokens), [None])
    assert [cache.row_lengths for cache in caches] == [(4, 4), (3, 3), (3, 3)]
    with pytest.raises(ValueError, match="position is 3"):
        model(IDX[:, 3:4], 4)


@torch.inference_mode()
def test_a_cache_in_place_of_another_is_noticed():
    model, caches = model_with()
    model(IDX[:, 3:4], 3)
    same, empty = caches[1].fork(), caches[1].empty_copy()
    other = create_kv_caches("lastrec", model.config, 2, 30)[1]
    other.load_state(caches[1].state() | {"policy": repr(other.policy)})
    expected = model(IDX[:, 4:5], 4)
    for cache in (same, other):  # whose plans are those of the others, or not
        model.kv_caches()[1] = caches[1]
        model.caches.crop(3)
        model(IDX[:, 3:4], 3)
        memory = model.caches.memory()
        model.kv_caches()[1] = cache
        torch.testing.assert_close(model(IDX[:, 4:5], 4), expected)
        assert model.caches.memory() is not memory
        assert caches[1].row_lengths == (4, 4)
    model.kv_caches()[1] = empty
    with pytest.raises(ValueError, match="position is 0"):
        model(IDX[:, 5:6], 5)


@torch.inference_mode()
def test_caches_of_equal_plans_with_other_histories_keep_their_own():
    """A row remembers how much of it is gone, also after it went back."""
    model = tiny_gpt(n_layer=3, sliding_window_size=4, sliding_window_indices=[1, 1, 1])
    model.set_kv_caches(2, max_seq_length=100)
    caches = model.kv_caches()
    n = caches[0].cache_length + 5
    model(torch.ones(2, n, dtype=torch.int64), 0)
    alone(caches[1], n, 2)
    caches[1].rewind([2, 2])
    assert [cache.row_fields[1] for cache in caches] == [(5, 5), (7, 7), (5, 5)]
    assert len({cache.plan_key() for cache in caches}) == 1
    model(IDX[:, :1], n)
    assert [cache.row_fields[1] for cache in caches] == [(6, 6), (7, 7), (6, 6)]


@pytest.mark.parametrize("method", ["commit", "prepare", "plan_key"])
@torch.inference_mode()
def test_methods_made_elsewhere_are_called_for_every_layer_and_call(method):
    called = []

    def noting(self, *args):
        called.append(self.block_idx)
        return getattr(DenseKVCache, method)(self, *args)

    kind = type("Noting", (DenseKVCache,), {method: noting})
    config = tiny_gpt(n_layer=3).config
    model, _ = model_with(caches=[kind(config, 2, layer, max_sequence_length=30) for layer in range(3)])
    for position in range(3, 6):
        called.clear()
        model(IDX[:, position : position + 1], position)
        times = 2 if method == "prepare" else 1  # before the layers, and when they run
        assert sorted(called) == sorted([0, 1, 2] * times)


@torch.inference_mode()
def test_what_lies_elsewhere_is_noticed():
    model, caches = model_with("snapkv", 12)
    memory = model.caches.memory()

    def moved():
        nonlocal memory
        before, memory = memory, model.caches.memory()
        return before is not memory

    for position in range(3, 10):
        model(IDX[:, position : position + 1], position)
        assert not moved()
    model.caches.rewind([1, 1])
    assert not moved()
    cache = caches[1]
    for change in (
        lambda: setattr(cache.storage, "k", cache.storage.k.clone()),
        lambda: cache.storage.register_buffer("v", cache.storage.v.clone(), persistent=False),
        lambda: setattr(cache.policy_state, "queries", cache.policy_state.queries.clone()),
        lambda: setattr(cache, "storage", cache.storage.empty_copy()),
        lambda: cache.storage.share_memory(),
        lambda: cache.policy_state.to(torch.float32),
        lambda: cache.to(torch.float32),
        lambda: model.to(torch.float32),
        lambda: delattr(cache, "watch_nothing"),
        lambda: model.kv_caches().__setitem__(1, cache.fork()),
        lambda: setattr(model.caches, "caches", CacheSpec().create(model.config, 2)),
    ):
        cache.watch_nothing = None
        moved()
        change()
        assert moved()
        assert not moved()
