"""Random runs of the engine, against a model without caches that computes everything anew for each token."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import StaticShapes, create_kv_caches, tiny_gpt

from litgpt.engine.caches import prepare_caches
from litgpt.engine.engine import Engine
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.engine.session import Session

RUNS = int(os.environ.get("LITGPT_TEST_EXAMPLES", "120"))  # of each of the two kinds; 1000 for a thorough run
SLOTS, SINKS = 9, 2
SMALL = {
    "n_embd": 16,
    "n_head": 2,
    "n_query_groups": 1,
    "intermediate_size": 24,
    "vocab_size": 24,
    "padded_vocab_size": 24,
}
SHAPES = {
    "llama": SMALL,
    "windows": SMALL | {"sliding_window_size": 5, "sliding_window_indices": [1, 0]},
}
torch.manual_seed(7)
MODELS = {name: tiny_gpt(**flags) for name, flags in SHAPES.items()}
NAIVE = {name: tiny_gpt(**flags) for name, flags in SHAPES.items()}
for name, gpt in NAIVE.items():
    gpt.load_state_dict(MODELS[name].state_dict())


class Masked:
    """Attention as it is defined: a softmax over all keys that a query may see."""

    def __init__(self, scale, window, sees):
        self.scale, self.window, self.sees = scale, window, sees

    def __call__(self, query, k_and_v, block_idx, sink_logits=None):
        heads = query.shape[1]
        keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_and_v.keys(), k_and_v.values()))
        scores = query @ keys.mT * self.scale
        p, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])
        visible = (j <= p) & self.sees(p, j)
        if self.window is not None:
            visible &= j > p - self.window
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ values).transpose(1, 2).flatten(2), None


def continuation(name, prompt, count, stops=(), sees=lambda p, j: j >= 0):
    """Greedy tokens after `prompt`, until one of `stops` ends them."""
    gpt, tokens = NAIVE[name], list(prompt)
    for block in gpt.transformer.h:
        block.attn.mha = Masked(block.attn.mha.scale, gpt.config.window(block.attn.block_idx), sees)
    for _ in range(count):
        tokens.append(int(gpt(torch.tensor([tokens]))[0, -1].argmax()))
        drawn = tokens[len(prompt) :]
        for stop in stops:
            if drawn[-len(stop) :] == list(stop):
                return drawn[: -len(stop)]
    return tokens[len(prompt) :]


tokens = st.lists(st.integers(0, 23), min_size=1, max_size=20)
stops = st.lists(st.lists(st.integers(0, 23), min_size=1, max_size=2), max_size=3)
sequences = st.lists(st.tuples(tokens, st.integers(1, 7), stops, st.integers(0, 5)), min_size=1, max_size=5)
thorough = settings(max_examples=RUNS)


@pytest.mark.timeout(600)
@thorough
@given(
    sequences,
    st.sampled_from(["llama", "windows"]),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 8)),
    st.booleans(),
)
def test_batches_whose_requests_join_and_leave(wanted, name, evicts, chunksize, static):
    """(prompt, new tokens, stop sequences, steps to wait before joining) for each sequence."""
    if evicts and name == "windows":
        evicts = False  # one eviction at a time
    model = MODELS[name]
    model.clear_kv_caches(assigned=True)
    model.layer_runner = StaticShapes() if static else None
    if evicts:
        model.assign_kv_caches(create_kv_caches("lastrec", model.config, len(wanted), SLOTS, n_sink=SINKS))
    prepare_caches(model, len(wanted), 30)
    engine = Engine(model, chunksize)
    waiting = []
    for prompt, count, stop, delay in wanted:
        waiting.append((delay, Sequence(torch.tensor(prompt), count, Sampling(temperature=0), stop)))
    made = [sequence for _, sequence in waiting]
    for step in range(100):
        joining = [sequence for delay, sequence in waiting if delay <= step]
        if joining:
            engine.add(joining)
            waiting = [(delay, sequence) for delay, sequence in waiting if delay > step]
        if not engine.step() and not waiting:
            break
    model.layer_runner = None
    for sequence, (prompt, count, stop, _) in zip(made, wanted, strict=True):
        first = min(chunksize or len(prompt), len(prompt))  # the prefill's first call sees all of itself

        def sees(p, j, first=first):
            return (p < first) | (j > p - (SLOTS - SINKS)) | (j < SINKS) if evicts else j >= 0

        assert sequence.output == continuation(name, prompt, count, stop, sees), (prompt, count, stop)


operations = st.lists(
    st.tuples(
        st.sampled_from(["extend", "generate", "generate", "crop", "fork", "prompt"]), tokens, st.integers(0, 99)
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.timeout(600)
@thorough
@given(operations, st.sampled_from(["llama", "windows"]), st.one_of(st.none(), st.integers(1, 8)))
def test_sessions_that_grow_go_back_and_part(history, name, chunksize):
    model = MODELS[name]
    model.clear_kv_caches(assigned=True)
    sessions = [(Session(model, prompt_chunksize=chunksize), [])]  # with what their tokens are to be
    for action, new, number in history:
        session, expected = sessions[number % len(sessions)]
        if action == "fork":
            sessions.append((session.fork(), list(expected)))
        elif action == "crop":
            n = number % (len(expected) + 1)
            session.crop(n)
            del expected[n:]
        elif len(expected) + len(new) + 6 > 100:
            continue
        elif action == "extend":
            session.extend(new)
            expected += new
        else:
            if action == "prompt":  # keeps a part of what there is
                expected[:] = expected[: number % (len(expected) + 1)] + new
            if not expected:
                continue
            count = 1 + number % 6
            drawn = list(session.generate(list(expected), count, temperature=0))
            assert drawn == continuation(name, expected, count)
            expected += drawn
        for one, held in sessions:
            assert one.tokens == held
