"""Prompts that begin as earlier ones did: what is cached of them is not computed again, and changes nothing."""

import random

import pytest
import torch
from tiny import StaticShapes, create_kv_caches, tiny_gpt

from litgpt.engine.caches import prepare_caches
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.engine import Engine, decode
from litgpt.engine.prefixes import PrefixStore
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.engine.session import Session

ROWS = 3
WINDOWS = {"sliding_window_size": 6, "sliding_window_indices": [1, 0]}


def model_with(name):
    torch.manual_seed(0)
    model = tiny_gpt(**(WINDOWS if name == "windows" else {}))
    if name == "static":
        model.layer_runner = StaticShapes()
    if name in ("lastrec", "h2o", "snapkv", "dense-int8"):
        length, args = (
            (None, {}) if name.startswith("dense") else (24, {"n_sink": 2} if name == "lastrec" else {"tail": 4})
        )
        model.assign_kv_caches(create_kv_caches(name, model.config, ROWS, length, **args))
    return model


def sequence(tokens, count=8, **settings):
    return Sequence(torch.tensor(tokens), count, Sampling(**{"temperature": 0, **settings}))


def alone(model, like):
    wanted = Sequence(torch.tensor(like.tokens[: like.prompt_length]), like.max_new_tokens, like.sampling)
    prepare_caches(model, ROWS, 100)
    for _ in decode(Engine(model), [wanted]):
        pass
    return wanted.output


@pytest.mark.parametrize("name", ["dense", "windows", "static", "dense-int8"])
@pytest.mark.parametrize("chance", range(6))
def test_every_answer_is_that_without_a_store_whatever_came_before(name, chance):
    model, choose = model_with(name), random.Random(chance)
    store = PrefixStore(choose.choice([40_000, 200_000, 10_000_000]))
    batch = ContinuousBatch(model, ROWS, 100, choose.choice([None, 3]), prefixes=store)
    known, running, finished = [[1, 2, 3]], [], []
    for _ in range(60):
        action = choose.choice(["ask", "ask", "step", "steps", "cancel"])
        if action == "ask":
            begin = choose.choice(known)
            prompt = begin[: choose.randint(1, len(begin))][:60] + [
                choose.randrange(100) for _ in range(choose.randint(1, 9))
            ]
            count = choose.randint(1, 12)
            settings = choose.choice([{}, {"temperature": 1.0, "seed": choose.randrange(9)}])
            running.append(sequence(prompt, count, **settings))
            batch.submit(running[-1])
        elif action == "cancel" and running:
            batch.cancel(choose.choice(running))
        else:
            for _ in range(1 if action == "step" else 5):
                batch.step()
        finished += [one for one in running if one.finish_reason]
        known += [one.tokens for one in running if one.finish_reason]
        running = [one for one in running if not one.finish_reason]
        assert store.n_bytes <= store.max_bytes
    batch.run()
    whole = [one for one in finished + running if one.finish_reason != "cancelled"]
    assert store.n_hits > 5
    outputs = [one.output for one in whole]
    batch.close()
    for one, output in zip(whole, outputs, strict=True):
        expected = alone(model, one)
        if name == "dense-int8":  # a chunk's own tokens are rounded once they are stored
            assert len(output) == len(expected)
        else:
            assert output == expected


@pytest.mark.parametrize("name", ["lastrec", "h2o", "snapkv"])
def test_caches_that_evict_go_on_from_checkpoints_as_a_session_does(name):
    model, session = model_with(name), None
    system, question = list(range(20)), [30 + i % 7 for i in range(25)]
    batch = ContinuousBatch(model, ROWS, prefixes=PrefixStore(10**9))

    def ask(prompt, checkpoint):
        one = sequence(prompt)
        one.checkpoints = (checkpoint,)
        batch.submit(one)
        batch.run()
        return one

    args = {"n_sink": 2} if name == "lastrec" else {"tail": 4}
    session = Session(model, name, 24, **args)
    session.extend(system + question[:1])
    first = ask(system + question, len(system))
    assert first.n_reused == 0
    assert first.output == list(session.generate(system + question, 8, temperature=0))
    second = ask(first.tokens + [5, 6, 7], len(system))
    assert second.n_reused == len(first.tokens) - 1
    assert second.output == list(session.generate(first.tokens + [5, 6, 7], 8, temperature=0))
    other = ask(system + [50, 51], len(system))
    assert other.n_reused == len(system)
    again = ask(system + question + [60, 61], len(system))  # another answer in place of the first
    assert again.n_reused == len(system + question)


def test_prompts_that_are_shared_by_several_sequences_are_reused_once():
    model = model_with("dense")
    batch = ContinuousBatch(model, ROWS, 100, prefixes=PrefixStore(10**9))
    first = sequence(list(range(30)))
    batch.submit(first)
    batch.run()
    prompt = torch.tensor(first.tokens[:20] + [1, 2])
    both = [Sequence(prompt, 6, Sampling(temperature=1.0, seed=seed)) for seed in (1, 2)]
    for one in both:
        batch.submit(one)
    batch.run()
    assert [one.n_reused for one in both] == [20, 0]  # the second has the first one's row
    assert [one.output for one in both] == [alone(model, one) for one in both]


def test_what_was_cancelled_in_its_prompt_is_kept_as_far_as_it_came():
    model = model_with("dense")
    batch = ContinuousBatch(model, 2, 100, 8, prefixes=PrefixStore(10**9))
    first = sequence(list(range(40)))
    batch.submit(first)
    batch.step()
    batch.step()
    batch.cancel(first)
    second = sequence(list(range(40)))
    batch.submit(second)
    batch.run()
    assert second.n_reused == 16
    assert second.output == alone(model, second)


def put(store, tokens, size=4, least=0, long_rope=False):
    store.put(tokens, least, long_rope, lambda: [{"keys": torch.zeros(size, dtype=torch.uint8)}])


def test_the_longest_common_prefix_is_found_and_the_last_token_is_run():
    store = PrefixStore(10_000)
    put(store, [1, 2, 3])
    put(store, [1, 2, 4, 5, 6])
    assert store.find([1, 2, 4, 5, 9])[1] == 4
    assert store.find([1, 2, 3])[1] == 2
    assert store.find([7, 2, 3]) is None
    assert store.find([1, 2, 4], long_rope=True) is None


def test_a_state_that_cannot_be_rewound_serves_prompts_that_contain_it():
    store = PrefixStore(10_000)
    put(store, [1, 2, 3, 4], least=3)
    assert store.find([1, 2, 5, 6]) is None
    assert store.find([1, 2, 3, 6])[1] == 3


def test_what_another_covers_is_not_kept_twice():
    store = PrefixStore(10_000)
    put(store, [1, 2, 3])
    put(store, [1, 2, 3, 4, 5])
    assert len(store) == 1
    put(store, [1, 2])
    assert len(store) == 1
    put(store, [1, 2, 3, 4, 5, 6, 7], least=6)  # cannot be rewound to the shorter one
    assert len(store) == 2
    put(store, [1, 2, 3], long_rope=True)
    assert len(store) == 3


def test_bytes_are_bounded_and_the_oldest_goes_first():
    store = PrefixStore(3 * 108)
    for first in range(3):
        put(store, [first], size=100)
    store.find([0, 1])
    put(store, [9], size=100)
    assert store.n_bytes == 3 * 108
    assert store.find([1, 1]) is None
    assert store.find([0, 1])
    put(store, [8], size=1000)
    assert len(store) == 3
    none = PrefixStore(0)
    put(none, [1])
    assert len(none) == 0
    with pytest.raises(ValueError, match="-1"):
        PrefixStore(-1)
