"""Random histories of a cache: any order of prefills, chunks, steps, crops, forks, reordered and joining rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.config import Config
from litgpt.kvcache import KVCacheParams
from litgpt.kvcache.testing import create_kv_cache

from .reference import ReferenceCache
from .score_reference import LOOKING, SCORES, ScoreReference

H, G, D = 2, 1, 4
ROWS = 3

number = st.integers(0, 99)
actions = ["prefill", "chunk", "steps", "steps", "some", "join", "crop", "crop", "crop", "fork", "reorder", "load"]
actions += ["rewind", "rewind", "leave", "extend"]
history = st.lists(st.tuples(st.sampled_from(actions), number, number), min_size=3, max_size=12)
kind = st.tuples(
    st.sampled_from(["dense", "lastrec", "lastrec", "knorm", "h2o", "snapkv", "dense-int8", "lastrec-int4"]),
    st.integers(2, 8),
    st.integers(0, 7),
    st.sampled_from([None, 1, 2, 3, 5, 9]),
)


class Pair:
    """A cache and its reference, which live through the same history."""

    def __init__(self, name, slots, sinks, window):
        scored = name in SCORES
        window = None if scored else window
        config = Config(n_layer=1, n_embd=H * D, n_head=H, n_query_groups=G, block_size=64, sliding_window_size=window)
        self.dense = name.startswith("dense")
        params = KVCacheParams.from_config(config, ROWS, 4 * slots if self.dense else slots)
        arguments = {} if self.dense else {"n_sink": sinks % slots}
        if scored:
            tail = 1 + sinks % (slots - 1)
            n_sink = sinks % (slots - tail)
            arguments = {"tail": tail, "n_sink": n_sink, "recent": 1 + sinks % (slots - tail - n_sink)}
        self.new = lambda: create_kv_cache(name, params, 0, config, **arguments)
        self.cache = self.new()
        capacity = None if self.dense else slots
        scale = 1 / math.sqrt(D)
        if scored:
            self.reference = ScoreReference(scale, SCORES[name], slots, *arguments.values(), name in LOOKING)
        else:
            self.reference = ReferenceCache(scale, capacity, arguments.get("n_sink", 0), window)
        self.reference.as_stored = self.as_stored

    def as_stored(self, key, value):
        stored = self.cache.storage.as_stored(key, value)
        return stored.keys(), stored.values()

    def tokens(self, batch, T):
        return [torch.randn(batch, heads, T, D) for heads in (H, G, G)]

    def bring(self, T, rows=None, anew=False, static=False):
        """Bring T tokens to `rows` (None: all); a dense cache that has no room for them says so."""
        lengths = [row.length for row in self.reference.rows]
        named = range(len(lengths)) if rows is None else rows
        position = 0 if anew else max(lengths[row] for row in named)
        if self.dense and position + T > self.cache.cache_length:
            with pytest.raises(IndexError, match=str(position + T)):
                self.cache.plan(position, len(named), T, rows)
            return
        if anew:
            self.reference.restart(named)
        tokens = self.tokens(len(named), T)
        plan = self.cache.plan(position, len(named), T, rows, static)
        output = self.cache.run(plan, *tokens)
        self.cache.commit(plan)
        torch.testing.assert_close(output.double(), self.reference.call(*tokens, rows), atol=1e-5, rtol=0)

    def do(self, action, a, b):
        B = len(self.reference.rows)
        if action == "prefill" or B == 0:
            T = min(b % 11 + 1, self.cache.max_prefill_length or 11)
            self.reference.start(self.tokens(1, 1)[1], a % ROWS + 1)
            self.bring(T, anew=True)
        elif action == "chunk":
            self.bring(a % 9 + 1)
        elif action == "steps":
            for _ in range(a % 5 + 1):
                self.bring(1, static=bool(b % 2))
        elif action in ("some", "join"):
            rows = torch.randperm(B)[: a % B + 1].tolist()
            self.bring(b % 11 + 1, rows, anew=action == "join")
        elif action == "crop":
            end, limit = self.reference.end, self.cache.crop_limit
            n = max(limit, end - a % 5 - 1)
            if 1 < limit:
                with pytest.raises(ValueError, match=f"{limit - 1} of {end} .*{limit}"):
                    self.cache.crop(limit - 1)
            self.cache.crop(n)
            self.reference.crop(n)
            if n == 0:
                self.reference.rows = []
        elif (
            action == "rewind"
        ):  # all but the first token of a call may be taken back, from each row as many as one likes
            T = min(a % 9 + 1, 1 + self.cache.max_rewindable_tokens)
            if T > 0 and self.reference.end:
                self.bring(T)
                self.rewind([(b + 3 * row) % T for row in range(B)])
        elif action == "leave":  # a row may always become empty
            leaving = a % B
            self.rewind([row.length if i == leaving else 0 for i, row in enumerate(self.reference.rows)])
        elif action == "extend" and B < ROWS:
            self.cache.extend(1)
            self.reference.rows.append(self.reference.rows[0].cropped(0))
        elif action == "fork":
            twin = self.cache.fork()
            self.cache.start(ROWS)
            plan = self.cache.plan(0, ROWS, 2)
            self.cache.run(plan, *self.tokens(ROWS, 2))
            self.cache = twin
        elif action == "reorder":
            rows = torch.randint(B, (a % ROWS + 1,)).tolist()
            self.cache.reorder(rows)
            self.reference.reorder(rows)
        elif action == "load":
            other = self.new()
            other.load_state(self.cache.state())
            self.cache = other

    def rewind(self, counts):
        self.cache.rewind(counts)
        self.reference.rewind(counts)

    def check(self):
        """Lengths agree, and every slot that names a position holds that token; those that may be seen are there."""
        rows = self.reference.rows
        assert self.cache.row_lengths == tuple(row.length for row in rows)
        if not self.reference.end:
            return
        positions, keys = self.cache.token_positions()[:, 0], self.cache.get_keys_values().keys()[:, 0]
        for b, row in enumerate(rows):
            held = positions[b][positions[b] >= 0]
            assert len(set(held.tolist())) == len(held)
            assert torch.equal(keys[b, positions[b] >= 0], row.keys[0, held])
            seen_next = self.reference.seen(row, max(row.length, row.prefill))
            assert set(held.tolist()) >= {p for p in seen_next if p < row.length}


@given(kind, history, number)
@settings(max_examples=300)
def test_a_cache_agrees_with_masked_attention_whatever_its_history(kind, history, seed):
    torch.manual_seed(seed)
    pair = Pair(*kind)
    for event in history:
        pair.do(*event)
        pair.check()
