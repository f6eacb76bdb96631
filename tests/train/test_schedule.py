"""Learning rates and the number of steps."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from litgpt.args import TrainArgs
from litgpt.train.schedule import cosine_schedule, learning_rate_factor, steps_of_run


def test_the_first_step_already_learns_and_the_warm_up_ends_at_the_full_rate():
    factors = [learning_rate_factor(step, 4, 20) for step in range(6)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[5] < 1.0


def test_the_cosine_ends_at_the_floor_and_never_goes_up():
    factors = [learning_rate_factor(step, 0, 10, floor=0.1) for step in range(11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.55)
    assert factors[10] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def test_no_warm_up_and_a_run_of_one_step_are_fine():
    assert learning_rate_factor(0, 0, 1) == 1.0
    assert learning_rate_factor(0, 1, 1) == 0.5


def test_min_lr_is_the_floor_of_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-2, 1e-5)]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    schedule = cosine_schedule(optimizer, 0, 5, min_lr=1e-4)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(1e-4), pytest.approx(1e-5)]  # a rate below the floor stays


ROWS = torch.zeros(38, 26, dtype=torch.long)  # 10 steps of 4 rows of 25 tokens, the last one smaller


def steps(loader=None, longest=512, **limits):
    loader = DataLoader(ROWS) if loader is None else loader
    return steps_of_run(loader, TrainArgs(global_batch_size=4, micro_batch_size=1, **limits), 2, longest)


class Stream(IterableDataset):
    """Rows that come one by one."""

    def __iter__(self):
        return iter(())


class Samples(list):
    lengths = (10, 20, 30, 40)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"epochs": 3}, 30),
        ({"epochs": 3, "max_steps": 7}, 7),
        ({"max_tokens": 1000}, 10),
        ({"max_tokens": 1050, "max_steps": 99}, 10),
        ({"epochs": 2, "max_tokens": 10**12}, 20),
        ({"max_tokens": 4096, "loader": DataLoader(Stream())}, 2),
        ({"max_tokens": 400, "loader": DataLoader(Samples("abcd"))}, 4),
    ],
)
def test_the_least_limit_counts(limits, expected):
    assert steps(**limits) == expected


def test_a_run_without_an_end_or_without_a_step_is_refused():
    with pytest.raises(ValueError, match="how long to train"):
        steps(DataLoader(Stream()), epochs=2)
    with pytest.raises(ValueError, match="gives no batches"):
        steps(DataLoader(ROWS[:0]), epochs=2)
    with pytest.raises(ValueError, match="max_tokens=99 is less than the 100 tokens"):
        steps(max_tokens=99)
