"""Whose caches a model runs with, and what becomes of them when runs are nested, fail or are interrupted."""

from threading import Thread

import pytest
import torch
from tiny import greedy_without_caches, tiny_gpt

from litgpt.engine.caches import CacheLease, prepare_caches
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.engine import Engine, decode
from litgpt.engine.loading import choose_kv_caches
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.generate.base import generate, generate_fn
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.layers import LayerCaches

GREEDY = Sampling(temperature=0)
PROMPT = torch.arange(5, 15)


def with_assigned_caches():
    model = tiny_gpt()
    choose_kv_caches(model, CacheSpec(cache_length=100))
    return model, model.kv_caches()


def test_a_lease_has_its_caches_in_the_model_only_while_it_runs():
    model, own = with_assigned_caches()
    lease = CacheLease(model, LayerCaches())
    lease.run(prepare_caches, model, 1, 30)
    leased = lease.caches.caches
    assert len(leased) == 2
    assert lease.run(model.kv_caches) == leased
    assert model.kv_caches() == own
    lease.run(lambda: model(PROMPT[None], 0))
    assert leased[0].next_token_pos == 10
    assert own[0].next_token_pos == 0


def test_default_caches_are_taken_along_and_given_back_and_assigned_ones_are_used_in_place():
    model = tiny_gpt()
    model.set_kv_caches(1, max_seq_length=50)
    own = model.kv_caches()
    first, second = CacheLease.take(model), CacheLease.take(model)
    assert first.caches.caches == own
    assert not second.caches.caches
    assert model.kv_caches() == []
    second.run(prepare_caches, model, 1, 20)
    first.release()
    second.release()  # the model has some already
    assert model.kv_caches() == own
    model, own = with_assigned_caches()
    assert CacheLease.take(model).caches is None
    assert model.kv_caches() == own


def test_runs_inside_runs_find_their_own_caches_and_leave_those_of_the_others():
    model, own = with_assigned_caches()
    outer, inner = (CacheLease(model, LayerCaches()) for _ in range(2))

    def inside():
        prepare_caches(model, 1, 20)
        mine = model.kv_caches()
        inner.run(prepare_caches, model, 1, 30)
        assert model.kv_caches() == mine
        assert outer.run(model.kv_caches) == mine
        assert CacheLease.take(model).caches is None  # the model's own are the assigned ones

    outer.run(inside)
    assert model.kv_caches() == own


def test_a_processor_may_generate_with_the_same_model():
    model = tiny_gpt()
    answer = greedy_without_caches(model, PROMPT[:4], 5)

    def ask(tokens, logits):
        inner = generate(model, PROMPT[:4], 9, temperature=0.0, include_prompt=False)
        assert torch.equal(inner, answer)
        return logits

    batch = ContinuousBatch(model, 1, 40)
    batch.submit(sequence := Sequence(PROMPT, 6, Sampling(temperature=0, processors=(ask,))))
    batch.run()
    assert sequence.output == greedy_without_caches(model, PROMPT, 6).tolist()


def test_caches_of_an_interrupted_run_are_empty_and_the_model_has_its_own():
    model, own = with_assigned_caches()
    lease = CacheLease(model, LayerCaches())
    lease.run(prepare_caches, model, 1, 30)

    def fill(error):
        model(PROMPT[None], 0)
        raise error

    for error, length in ((KeyboardInterrupt(), 0), (ZeroDivisionError(), 10)):
        with pytest.raises(type(error)):
            lease.run(fill, error)
        assert model.kv_caches() == own
        assert lease.caches.caches[0].next_token_pos == length


def test_one_thread_at_a_time_runs_a_model():
    model, running, seen = tiny_gpt(), [], []

    def work():
        running.append(1)
        model(PROMPT[None], 0)
        seen.append(len(running))
        running.pop()

    leases = [CacheLease(model, LayerCaches()) for _ in range(4)]
    for lease in leases:
        lease.run(prepare_caches, model, 1, 30)
    threads = [Thread(target=lambda lease=lease: [lease.run(work) for _ in range(5)]) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 20


@pytest.mark.parametrize("first", [3, 30])
def test_generators_that_are_read_in_turn_give_what_they_give_alone(first):
    model = tiny_gpt()
    prompts = [PROMPT, torch.arange(first), PROMPT[2:7]]
    alone = [greedy_without_caches(model, prompt, 8).tolist() for prompt in prompts]
    args = {"temperature": 0.0, "include_prompt": False, "include_eos": False}
    runs = [generate_fn(model, prompt, len(prompt) + 8, **args) for prompt in prompts]
    assert [[int(x) for x in row] for row in zip(*zip(*runs, strict=True), strict=True)] == alone
    assert len(model.kv_caches()) == 2


def test_an_engine_in_place_that_was_overtaken_says_so_and_takes_new_sequences():
    model = tiny_gpt()
    prepare_caches(model, 1, 40)
    engine, other = Engine(model), Engine(model)
    engine.add([Sequence(PROMPT, 8, GREEDY)])
    engine.step()
    for _ in decode(other, [Sequence(PROMPT, 8, GREEDY)]):  # of the same lengths
        pass
    with pytest.raises(ValueError, match="others have used the model's key-value caches"):
        engine.step()
    again = Sequence(PROMPT, 8, GREEDY)
    for _ in decode(engine, [again]):
        pass
    assert again.output == greedy_without_caches(model, PROMPT, 8).tolist()


def test_a_batch_keeps_its_caches_whatever_others_do_with_the_model_between_steps():
    model = tiny_gpt()
    batch = ContinuousBatch(model, 2, 60)
    batch.submit(one := Sequence(PROMPT, 12, GREEDY))
    while batch.unfinished:
        batch.step()
        generate(model, PROMPT[:4], 9, temperature=0.0)
        model.set_kv_caches(1, max_seq_length=20)
        model(PROMPT[None], 0)
    assert one.output == greedy_without_caches(model, PROMPT, 12).tolist()
