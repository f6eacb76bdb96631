"""A few random requests to a server; `stress.py` sends more."""

import os

import torch
from until import until

from litgpt.engine.sampling import Sampling

from .conftest import serving
from .reference import GAPS, Reference, alternatives
from .stress import CONTEXT, Stress, tiny_llm


def test_random_requests_get_their_own_answers_and_leave_nothing(checkpoint):
    options = "--batch_size", 4, "--max_queue", 200, "--prefix_cache", 5
    with serving(checkpoint, *options) as (address, process):
        stress = Stress(address, process.pid, tiny_llm(), leave=0.3)
        stress.run(24, 0)
        before = stress.resources()
        stress.run(24, 0, first_seed=48)
        until(lambda: stress.resources()["files"] <= before["files"] + 2)  # connections that are being closed
        assert stress.resources()["Threads"] <= before["Threads"] + min(32, os.cpu_count() + 4)  # of asyncio's pool
    assert not stress.problems
    assert len(stress.ties) < 6
    assert min(stress.counts.values()) > 3


def test_only_answers_that_rounding_decides_may_differ():
    llm = tiny_llm()
    reference, body = Reference(llm, CONTEXT), {"prompt": "Hello", "max_tokens": 12, "seed": 3, "temperature": 0}
    tokenizer, weight = reference.tokenizer, llm.model.lm_head.weight

    def gap(text, whole=True):
        return reference.gap("/v1/completions", body, [text], whole)

    own = reference.answer("/v1/completions", body, 0).run(())[1]
    other = next(token for token in tokenizer.encode("abcdefghijklmnop").tolist() if token not in own)
    text, another = tokenizer.decode(own), tokenizer.decode([*own[:-1], other])
    assert (gap(text), gap(text[:5], whole=False)) == (0, 0)
    assert [gap(one) for one in (another, text[:-1], "")] == [None] * 3
    weight[other] = weight[own[-1]] * (1 - 1e-6)  # the two are about as likely
    assert gap(text) == 0
    assert gap(another) in GAPS
    assert gap(text[:-1]) is None


def test_draws_next_to_the_border_of_two_tokens_are_decided_by_rounding():
    logits = torch.tensor([0.0, 1.0, -9.0, 1.00001])
    border, likelier = logits.double().softmax(0)[0].item(), logits.double().softmax(0)[[1, 3]].sum().item()

    def found(uniform, gap, **settings):
        return alternatives(logits, Sampling(**{"temperature": 1.0, **settings}), uniform, gap)

    assert found(border + 1e-4, 1e-6) == {1}
    assert found(border + 1e-4, 1e-4) == {1, 3}
    assert found(border + 2e-7, 1e-6) == {0, 1}
    assert found(0, 1e-6, temperature=0) == {3}
    assert found(0, 1e-4, temperature=0) == {1, 3}
    assert found(0.0, 1e-6, top_p=likelier + 2e-7) == {0, 1}
    assert found(0.0, 1e-6, top_p=likelier - 1e-4) == {1}
