"""A few random requests to a server; `stress.py` sends more."""

from .conftest import serving
from .stress import Stress, tiny_llm


def test_random_requests_get_their_own_answers_and_leave_nothing(checkpoint):
    options = "--batch_size", 4, "--max_queue", 200, "--prefix_cache", 5
    with serving(checkpoint, *options) as (address, process):
        stress = Stress(address, process.pid, tiny_llm(), leave=0.3)
        stress.run(24, 0)
        before = stress.resources()
        stress.run(72, 0, first_seed=24)
        after = stress.resources()
    assert not stress.problems
    assert stress.counts.pop("tied") < 3
    assert min(stress.counts.values()) > 3
    assert after["files"] <= before["files"] + 2  # connections that are being closed
    assert after["Threads"] <= before["Threads"] + 6  # of asyncio's pool
