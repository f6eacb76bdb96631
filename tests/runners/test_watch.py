"""What a faster way to run layers has to notice of them."""

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from litgpt.runners.watch import ModuleWatch


def watched():
    norm, outer = nn.RMSNorm(4), nn.Sequential(nn.Linear(4, 4))
    watch = ModuleWatch([norm, *outer.modules()])
    for _ in range(3):  # as between steps
        assert not watch.has_hooks()
        assert watch.is_unchanged()
    return norm, outer, watch


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_noticed_as_long_as_they_are_there(kind):
    norm, outer, watch = watched()
    for module in (norm, outer, outer[0]):
        handle = getattr(module, kind)(lambda *_: None)
        for _ in range(4):
            assert watch.has_hooks()
        handle.remove()
        assert not watch.has_hooks()
    nn.Linear(2, 2).register_forward_hook(lambda *_: None)  # of another module
    assert not watch.has_hooks()


def test_a_hook_whose_number_was_given_before_a_step_and_that_is_added_during_the_step_is_noticed():
    norm, _, watch = watched()
    handle = RemovableHandle(norm._forward_hooks)  # what another thread does first
    assert not watch.has_hooks()
    norm._forward_hooks[handle.id] = lambda *_: None
    assert watch.has_hooks()


def test_tensors_and_modules_that_are_others_or_elsewhere_are_noticed():
    for change in (
        lambda norm, outer: setattr(norm, "weight", nn.Parameter(torch.ones(4))),
        lambda norm, outer: setattr(norm.weight, "data", torch.ones(4)),
        lambda norm, outer: norm._parameters.__setitem__("weight", nn.Parameter(norm.weight.detach().clone())),
        lambda norm, outer: outer.__setitem__(0, nn.Linear(4, 4)),
        lambda norm, outer: outer.to(torch.bfloat16),
        lambda norm, outer: norm.share_memory(),
    ):
        norm, outer, watch = watched()
        change(norm, outer)
        assert not watch.is_unchanged()
