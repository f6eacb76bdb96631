"""Caches whose heads keep different numbers of tokens, against attention and evictions written out head by head."""

import dataclasses

import pytest
import torch

from litgpt.config import Config
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.by_head import ByHeadKVCache, share_slots
from litgpt.kvcache.storages import STORAGES

from .cases import call, go_on, snapshot, unchanged
from .test_contract import Sizes

D, T, SLOTS, TAIL, SINKS, RECENT = 8, 40, 16, 4, 2, 3
STORED = [name for name, storage in STORAGES.items() if not storage.blocks]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Caches to be tested, and what their attention is like."""

    heads: tuple[int, int] = (4, 2)  # H, G
    storage: str = "default"
    softcap: float | None = None
    sinks: bool = False
    run: int = 1

    @property
    def config(self):
        H, G = self.heads
        return Config(
            n_layer=2,
            n_embd=H * D,
            n_head=H,
            n_query_groups=G,
            block_size=128,
            attention_logit_softcapping=self.softcap,
            attention_sinks=self.sinks,
        )

    @property
    def spec(self):
        args = {"tail": TAIL, "n_sink": SINKS, "recent": RECENT, "run": self.run}
        return CacheSpec("kvzip", self.storage, SLOTS, budget="scores", **args)

    @property
    def sink_logits(self):
        return torch.linspace(-1, 1, self.heads[0]) if self.sinks else None

    def caches(self):
        return self.spec.create(self.config, 1, dtype=torch.float32)

    def tokens(self, count):
        H, G = self.heads
        return [2 * torch.randn(1, heads, count, D) for heads in (H, G, G)]

    def as_stored(self, key, value):
        params = dataclasses.replace(self.caches()[0].get_params(), cache_length=key.shape[2])
        stored = STORAGES[self.storage](params).as_stored(key, value)
        return stored.keys(), stored.values()

    def filled(self, length=T):
        """Caches that have read a text, with its keys and values and their scores, (G, T) a layer."""
        caches, texts = self.caches(), [self.tokens(length)[1:] for _ in range(2)]
        scores = [torch.rand(self.heads[1], length) * (1 + layer) for layer in range(2)]
        pairs = zip(caches, texts, scores, strict=True)
        tokens = [cache.tokens_read(DefaultKeysAndValues(*text), own[None, None].clone()) for cache, text, own in pairs]
        share_slots(caches, tokens)
        for cache, of_layer in zip(caches, tokens, strict=True):
            cache.take_over(of_layer)
        return caches, texts, scores


KINDS = [
    Kind(),
    Kind((4, 1), softcap=2.0),
    Kind((3, 3), sinks=True),
    Kind((4, 2), run=3),
    *(Kind(storage=name) for name in STORED if name != "default"),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def chosen_by_hand(kind, scores):
    """Positions that stay in every head of both layers: of all heads together those of the highest scores."""
    found = []
    for layer, own in enumerate(scores):
        for g in range(len(own)):
            for p in range(T):
                score, run = (
                    own[g, p].item(),
                    range(p // kind.run * kind.run, min(T, p // kind.run * kind.run + kind.run)),
                )
                if kind.run > 1:
                    score = own[g, list(run)].mean().item()
                always = p < SINKS or p >= T - RECENT
                found.append((float("inf") if always else score, p, layer, g))
    found.sort(reverse=True)
    best = found[: 2 * kind.heads[1] * (SLOTS - TAIL)]
    return [
        [sorted(p for _, p, *place in best if place == [layer, g]) for g in range(kind.heads[1])] for layer in range(2)
    ]


class HeadByHand:
    """All tokens of one head, the positions that stay, and their scores."""

    def __init__(self, kind, g, keys, values, kept, scores):
        self.kind, self.g, self.room = kind, g, len(kept) + TAIL
        self.keys, self.values, self.kept = keys, values, list(kept)
        self.scores = {p: scores[p].item() for p in kept}
        self.queries = {}

    def weights(self, query, position):
        """Of a query (H / G, D): those of the tokens that stay, up to its position, (H / G, n)."""
        H, G = self.kind.heads
        seen = [p for p in self.kept if p <= position]
        logits = query @ self.keys[seen].mT / D**0.5
        if self.kind.softcap:
            logits = self.kind.softcap * torch.tanh(logits / self.kind.softcap)
        if self.kind.sinks:
            own = self.kind.sink_logits.view(G, H // G)[self.g, :, None]
            return torch.cat((logits, own), -1).softmax(-1)[:, :-1], seen
        return logits.softmax(-1), seen

    def evict(self):
        for position, query in self.queries.items():
            weights, seen = self.weights(query, position)
            for p, weight in zip(seen, weights.amax(0).tolist(), strict=True):
                self.scores[p] = max(self.scores.get(p, 0.0), weight)
        self.queries = {}
        rank = {p: self.scores[p] for p in self.kept}
        if self.kind.run > 1:
            runs = {p: [q for q in self.kept if q // self.kind.run == p // self.kind.run] for p in self.kept}
            rank = {p: sum(self.scores[q] for q in runs[p]) / len(runs[p]) for p in self.kept}
        for p in self.kept[:SINKS] + self.kept[-RECENT:]:
            rank[p] = float("inf")
        best = sorted(self.kept, key=lambda p: (rank[p], p), reverse=True)
        self.kept = sorted(best[: self.room - TAIL])

    def call(self, query, key, value):
        """Outputs (H / G, T, D) of new tokens."""
        outputs = []
        for t in range(key.shape[0]):
            if len(self.kept) == self.room:
                self.evict()
            position = len(self.keys)
            self.keys, self.values = torch.cat((self.keys, key[t : t + 1])), torch.cat((self.values, value[t : t + 1]))
            self.kept.append(position)
            self.queries[position] = query[:, t]
            weights, seen = self.weights(query[:, t], position)
            outputs.append(weights @ self.values[seen])
        return torch.stack(outputs, 1)


@every_kind
def test_what_stays_is_the_best_of_all_heads_of_all_layers(kind):
    caches, texts, scores = kind.filled()
    expected = chosen_by_hand(kind, scores)
    assert len({len(kept) for layer in expected for kept in layer}) > 1
    for cache, text, of_layer in zip(caches, texts, expected, strict=True):
        positions, held = cache.token_positions(), cache.get_keys_values()
        assert [[p for p in own if p >= 0] for own in positions[0].tolist()] == of_layer
        keys, values = kind.as_stored(*text)
        for g, kept in enumerate(of_layer):
            assert torch.equal(held.keys()[0, g, : len(kept)], keys[0, g, kept])
            assert torch.equal(held.values()[0, g, : len(kept)], values[0, g, kept])


@pytest.mark.parametrize("cuts", [(1,) * 23, (9, 1, 1, 12), (23,)], ids=len)
@every_kind
def test_outputs_and_later_evictions_are_those_of_every_head_alone(kind, cuts):
    caches, texts, scores = kind.filled()
    (H, G), (layer, cache) = kind.heads, (1, caches[1])
    keys, values = kind.as_stored(*texts[layer])
    kept = cache.token_positions()[0].tolist()
    by_hand = [
        HeadByHand(kind, g, keys[0, g], values[0, g], [p for p in kept[g] if p >= 0], scores[layer][g])
        for g in range(G)
    ]
    query, key, value = kind.tokens(sum(cuts))
    stored = kind.as_stored(key, value)
    parts = [x[0].unflatten(0, (G, -1)) for x in (query, *stored)]
    expected = torch.cat([own.call(q, k[0], v[0]) for own, q, k, v in zip(by_hand, *parts, strict=True)])
    outputs, start = [], 0
    for size in cuts:
        plan = cache.plan(T + start, 1, size)
        own = [x[:, :, start : start + size] for x in (query, key, value)]
        outputs.append(cache.run(plan, *own, None, kind.sink_logits))
        cache.commit(plan)
        start += size
    found = torch.cat(outputs, 1)[0].unflatten(-1, (H, D)).transpose(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [[p for p in own if p >= 0] for own in cache.token_positions()[0].tolist()] == [own.kept for own in by_hand]


@pytest.mark.parametrize("cuts", [(1,) * 30, (30,), (11, 1, 18), (20, 9, 1)], ids=len)
@every_kind
def test_until_slots_are_shared_a_cache_is_bit_by_bit_one_of_its_policy(kind, cuts):
    """So the guarantees that `test_contract` and `test_state` find there hold here, for one row."""
    args = {"tail": TAIL, "n_sink": SINKS, "recent": RECENT, "run": kind.run}
    plain = CacheSpec("kvzip", kind.storage, SLOTS, **args).create(kind.config, 1, dtype=torch.float32)[1]
    own, tokens, more = kind.caches()[1], kind.tokens(30), kind.tokens(8)
    found = []
    for cache in (own, plain):
        start, outputs = 0, []
        for part in zip(*(x.split(cuts, 2) for x in tokens), strict=True):
            plan = cache.plan(start, 1, part[0].shape[2])
            outputs.append(cache.run(plan, *part, None, kind.sink_logits))
            cache.commit(plan)
            start = cache.next_token_pos
        state, again = cache.state(), cache.empty_copy()
        again.load_state(state)
        one = cache.empty_copy()
        one.start(1)
        one.load_state(cache.state_of_row(0), row=0)
        outputs += [go_on(copied, more) for copied in (cache.fork(), again, one)]
        cache.crop(max(cache.crop_limit, cache.next_token_pos - 2))
        kept = cache.get_keys_values()
        tensors = [*outputs, go_on(cache, more), cache.token_positions(), kept.keys(), kept.values(), *cache.buffers()]
        numbers = cache.row_lengths, cache.crop_limit, cache.max_rewindable_tokens, cache.size_estimate()
        found.append((tensors, numbers, {name: x for name, x in state.items() if not torch.is_tensor(x)}))
    (tensors, *others), (expected, *wanted) = found
    assert others == wanted
    assert all(map(torch.equal, tensors, expected))


@every_kind
def test_a_wrong_call_is_one_clear_error_and_changes_nothing(kind):
    (cache, _), *_ = kind.filled()
    call(cache, *kind.tokens(6))
    before, (query, key, value) = snapshot(cache), kind.tokens(2)
    for error, message, own, position in (
        (ValueError, f"{T}.* {T + 6}", (query, key, value), T),
        (ValueError, f"query.*{D}", (query[..., :4], key, value), T + 6),
        (ValueError, "float32.*float64", (query, key.double(), value), T + 6),
        (ValueError, "2 .*1", [x.expand(2, -1, -1, -1) for x in (query, key, value)], T + 6),
    ):
        with pytest.raises(error, match=message):
            cache(*own, torch.zeros(len(own[1]), 2), position)
        assert unchanged(cache, before)
    cache.mha.attend_consecutive, kept = lambda *_, **__: 1 / 0, cache.mha.attend_consecutive
    with pytest.raises(ZeroDivisionError):
        cache(query, key, value, torch.zeros(1, 2), T + 6)
    cache.mha.attend_consecutive = kept
    assert (cache.next_token_pos, cache.kept_by_head) == (0, ())


@every_kind
def test_bytes_are_those_allocated_and_in_all_those_of_as_many_slots_in_every_head(kind):
    caches = kind.caches()

    def total():
        parts = [cache.size_estimate() for cache in caches]
        allocated = [sum(8 * x.untyped_storage().nbytes() for x in cache.buffers()) for cache in caches]
        assert [bits for bits, _ in parts] == [sum(own.values()) for _, own in parts] == allocated
        return sum(allocated)

    before = total()
    assert before == sum(type(cache).size_estimate_apriori(cache.get_params())[0] for cache in caches)
    caches, *_ = kind.filled()
    assert total() == before
    assert len({cache.size_estimate()[0] for cache in caches}) > 1
    for cache in caches:
        call(cache, *kind.tokens(11))
    assert total() == before
    for cache in caches:
        cache.clear()
        assert cache.kept_by_head == ()
    assert total() == before


@every_kind
def test_state_fork_and_crop_go_on_bit_identically(kind):
    (cache, other), *_ = kind.filled()
    call(cache, *kind.tokens(6))  # two tokens after an eviction
    assert cache.crop_limit == T + 4
    more, rest = kind.tokens(2), kind.tokens(8)
    copies = [cache.fork(), *(kind.caches()[0] for _ in range(3))]
    copies[1].load_state(cache.state())
    copies[2].start(1)
    copies[2].load_state_of_row(0, cache.state_of_row(0))
    copies[3].load_state(other.state())
    copies[3].load_state(cache.state(copy=False))
    call(copies[0], *more)
    copies[0].crop(T + 6)
    expected = go_on(cache, rest)
    for copied in copies:
        assert torch.equal(go_on(copied, rest), expected)
        assert torch.equal(copied.token_positions(), cache.token_positions())
    with pytest.raises(ValueError, match=f"cannot crop to {T + 3}"):
        cache.crop(T + 3)


def test_a_state_that_does_not_fit_changes_nothing():
    kind = Kind()
    (cache, other), *_ = kind.filled()
    before = snapshot(cache)
    state = other.state()
    for wrong in (
        {**state, "policy": "another"},
        {**state, "kept_by_head": [SINKS, 2 * SLOTS]},
        {**state, "kept_by_head": [12]},
        {**state, "kept_by_head": [n + 1 for n in state["kept_by_head"]]},
        {name: x for name, x in state.items() if name != "kept_by_head"},
    ):
        with pytest.raises(ValueError, match=r"another|heads keep|the cache needs"):
            cache.load_state(wrong)
        assert unchanged(cache, before)


@every_kind
def test_a_cache_that_was_emptied_is_as_a_new_one(kind):
    ways = [
        lambda cache: cache.clear(),
        lambda cache: cache.start(1),
        lambda cache: cache.crop(0),
        lambda cache: cache.rewind([cache.next_token_pos]),
        lambda cache: None,
    ]
    tokens = kind.tokens(T)
    fresh = kind.caches()[0]
    expected = fresh(*tokens, torch.zeros(1, T), 0)
    for empty in ways:
        (cache, _), *_ = kind.filled()
        empty(cache)
        if empty is not ways[-1]:
            assert cache.kept_by_head == ()
            assert cache.token_positions().shape[-1] == cache.current_length == 0
        assert torch.equal(cache(*tokens, torch.zeros(1, T), 0), expected)
        assert cache.kept_by_head == ()
        assert torch.equal(cache.token_positions(), fresh.token_positions())
        assert torch.equal(
            go_on(cache.fork(), [x[:, :, :8] for x in tokens]), go_on(fresh.fork(), [x[:, :, :8] for x in tokens])
        )


@every_kind
def test_nothing_is_read_back_from_the_device_between_two_readings(kind):
    """On the meta device there is nothing to read: `item`, `tolist`, `nonzero` or `if tensor` would fail."""
    cache = kind.spec.create(kind.config, 1, "meta", torch.float32)[0]
    H, G = kind.heads
    cache.hold([SLOTS + 3 * g for g in range(G)])
    keys, values = (x.to("meta") for x in kind.tokens(T)[1:])
    cache.take_over(cache.tokens_read(DefaultKeysAndValues(keys, values), torch.empty(1, 1, G, T, device="meta")))
    for count in (1, 9, 1, 14):
        assert call(cache, *(x.to("meta") for x in kind.tokens(count))).shape == (1, count, H * D)
    assert cache.kept_by_head == tuple(SLOTS + 3 * g for g in range(G))


def test_a_decode_step_reads_keys_where_they_are():
    kind = Kind((8, 2))
    cache = kind.caches()[0]
    cache.hold([500, 700])
    cache.take_over(cache.tokens_read(DefaultKeysAndValues(*kind.tokens(800)[1:]), torch.rand(1, 1, 2, 800)))
    tokens, plan = kind.tokens(1), cache.plan(800, 1, 1)
    with Sizes() as sizes:
        cache.run(plan, *tokens)
    assert sizes.made < 400 * D


def test_what_is_impossible_is_refused_in_one_line():
    with pytest.raises(ValueError, match="for one sequence at a time, not for 3: use batch_size=1"):
        Kind().spec.create(Kind().config, 3)
    for name in ("snapkv", "h2o-int8", "lastrec"):
        with pytest.raises(
            ValueError, match=f"budget='scores' is for policies .* such as kvzip, and {name.partition('-')[0]}"
        ):
            CacheSpec.parse(name, budget="scores")
    (cache, _), *_ = Kind().filled()
    with pytest.raises(ValueError, match="do not run in compiled code: leave out --compile"):
        cache.plan(T, 1, 1, static=True)
    with pytest.raises(ValueError, match="2 must be in 1..1"):
        cache.extend(1)


def test_layers_with_a_window_take_no_part():
    config = dataclasses.replace(Kind().config, sliding_window_size=8, sliding_window_indices=[1, 0])
    kinds = [isinstance(cache, ByHeadKVCache) for cache in Kind().spec.create(config, 1)]
    assert kinds == [False, True]
