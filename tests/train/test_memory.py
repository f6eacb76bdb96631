"""Gradients and an optimizer's numbers in memory of their own: nothing else about a run changes."""

import pytest
import torch
from tiny import tiny_gpt

from litgpt.train.kept_gradients import KeptGradients
from litgpt.train.model import TrainingModel
from litgpt.train.optimizers import reserve_state


def trained(kept, kind=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = tiny_gpt(bias=True).requires_grad_(True)
    unused = torch.nn.Parameter(torch.ones(3))
    parameters = [*model.parameters(), unused]
    optimizer = kind(parameters, lr=1e-2, **options)
    if kept:
        KeptGradients(parameters)
        reserve_state(optimizer)
    places = []
    for _ in range(3):
        for _ in range(2):
            ids = torch.randint(0, 100, (2, 20))
            TrainingModel(model)(ids, ids).backward()
        assert unused.grad is None
        places.append([p.grad.data_ptr() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer, places


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_weights_are_the_same_bit_for_bit(kind, options):
    (plain, first, _), (kept, second, _) = trained(False, kind, **options), trained(True, kind, **options)
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)
        for name, value in first.state[a].items():
            assert value is None or torch.equal(value, second.state[b][name])


def test_gradients_stay_where_they_are():
    _, _, places = trained(True, fused=True)
    assert places[0] == places[1] == places[2]
    assert len(set(places[0])) == len(places[0])
