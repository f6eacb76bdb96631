"""LitGPT's functions for layers on several devices; what spreads them is tested in tests/parallel/test_pipeline.py."""

import pytest
import torch
from tiny import greedy_without_caches, tiny_gpt

from litgpt.generate.base import generate
from litgpt.generate.sequentially import chunk_sizes, layer_to_device, replace_device, sequential
from litgpt.model import Block

CPU = torch.device("cpu")


def test_layers_are_spread_and_have_caches_of_that_length():
    model, prompt = tiny_gpt(n_layer=3), torch.arange(7)
    expected = greedy_without_caches(model, prompt, 9)
    model = sequential(model, CPU, 40, 2)
    assert model.layer_devices == [CPU] * 3
    assert {cache.cache_length for cache in model.kv_caches()} == {40}
    assert torch.equal(generate(model, prompt, 16, temperature=0, include_prompt=False), expected)


def test_more_devices_than_layers_are_refused():
    with pytest.raises(ValueError, match="number of layers in the model must be larger than the number of devices"):
        sequential(tiny_gpt(), CPU, 40, 3)


def test_layers_have_the_number_of_their_device():
    model = tiny_gpt(n_layer=5)
    names = [f"transformer.h.{i}" for i in range(5)]
    assert layer_to_device(model, Block, chunk_sizes(5, 2)) == dict(zip(names, [0, 0, 1, 1, 1], strict=True))
    with pytest.raises(ValueError, match="Found 5 for chunk_on"):
        layer_to_device(model, Block, [1, 1])


def test_what_is_on_a_device_is_moved_and_nothing_else():
    inner = torch.nn.Linear(2, 2)
    outer = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), inner, torch.nn.BatchNorm1d(2))
    outer.register_buffer("here", torch.zeros(1))
    assert replace_device(outer, CPU, torch.device("meta")) is outer
    assert {tensor.device.type for tensor in outer.state_dict().values()} == {"meta"}
    inner.bias = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"multiple devices: \{'1.weight': .*'meta'\), '1.bias': .*'cpu'\)\}"):
        replace_device(outer, CPU, torch.device("meta"))


def test_a_child_that_is_elsewhere_stays():
    outer = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"))
    outer.register_buffer("here", torch.zeros(1))
    replace_device(outer, torch.device("meta"), torch.device("meta"))
    replace_device(outer, CPU, CPU)
    assert outer[0].weight.is_meta
    assert outer.here.device == CPU
