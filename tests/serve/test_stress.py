"""A few random requests to a server; `stress.py` sends more."""

import pytest

from .conftest import serving
from .reference import GAPS, Reference
from .stress import CONTEXT, Stress, tiny_llm


def test_random_requests_get_their_own_answers_and_leave_nothing(checkpoint):
    options = "--batch_size", 4, "--max_queue", 200, "--prefix_cache", 5
    with serving(checkpoint, *options) as (address, process):
        stress = Stress(address, process.pid, tiny_llm(), leave=0.3)
        stress.run(24, 0)
        before = stress.resources()
        stress.run(48, 0, first_seed=24)
        after = stress.resources()
    assert not stress.problems
    assert len(stress.ties) < 3
    assert min(stress.counts.values()) > 3
    assert after["files"] <= before["files"] + 2  # connections that are being closed
    assert after["Threads"] <= before["Threads"] + 6  # of asyncio's pool


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.9, "top_k": 40}])
def test_only_what_rounding_explains_counts_as_a_tie(sampling):
    llm = tiny_llm()
    reference = Reference(llm, CONTEXT)
    body = {"prompt": "Hello", "max_tokens": 12, "seed": 3, **sampling}

    def answer():
        return llm.generate("Hello", max_new_tokens=12, **sampling, seed=3)

    own = answer()
    assert reference.gap("/predict", body, [own]) == 0
    assert reference.gap("/predict", body, [own[:5]], whole=False) == 0
    for text in (own[:-1], own[:-1] + chr(ord(own[-1]) ^ 1), "", own + "a"):
        assert reference.gap("/predict", body, [text]) is None
