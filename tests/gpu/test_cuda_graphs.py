"""Compiled decode steps are replayed as CUDA graphs: one graph for all positions, with the tokens of plain layers."""

import copy

import pytest
import torch
from tiny import create_kv_caches, tiny_gpt
from torch._dynamo.utils import counters

from litgpt.generate.base import batched_generate_fn
from litgpt.runners.compiled import compile_decode
from litgpt.runners.quantized_weights import quantize_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _no_graphs_yet():
    torch._dynamo.reset()
    counters.clear()


def run(model, prompts, length):
    prompts = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    options = {"sample_args": {"temperature": 0.0}, "include_prompt": False, "include_eos": True}
    steps = batched_generate_fn(model, prompts, length, **options)
    return [[None if x is None else x.tolist() for x in step] for step in steps]


def is_one_graph(device):
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    if device.type == "cuda":
        assert not counters["inductor"]["cudagraph_skips"]


def test_h2o_from_the_first_position_to_4096_is_one_graph(device):
    end = 4096 if device.type == "cuda" else 300
    model = tiny_gpt(block_size=end, **SMALL).to(device)
    plain = copy.deepcopy(model)
    for gpt in (model, plain):
        gpt.assign_kv_caches([cache.to(device) for cache in create_kv_caches("h2o", gpt.config, 1, 128)])
    compile_decode(model)
    assert run(model, [[3]], end) == run(plain, [[3]], end)
    is_one_graph(device)


@pytest.mark.parametrize("kv_cache", ["dense", "lastrec", "snapkv"])
def test_tokens_of_a_batch_are_those_of_plain_layers(kv_cache, device):
    model = tiny_gpt(block_size=1024, **SMALL).to(device)
    plain = copy.deepcopy(model)
    length = 800 if kv_cache == "dense" else 64
    for gpt in (model, plain):
        gpt.assign_kv_caches([cache.to(device) for cache in create_kv_caches(kv_cache, gpt.config, 2, length)])
    compile_decode(model)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    for end in (40, 600):  # in two runs, the second beyond the first one's bucket of slots
        assert run(model, prompts, end) == run(plain, prompts, end)
    is_one_graph(device)


@pytest.mark.parametrize("storage", ["int8", "int4", "fp8"])
@torch.inference_mode()
def test_logits_with_keys_and_values_in_fewer_bits(storage, device):
    model = tiny_gpt(block_size=1024, **SMALL).to(device)
    plain = copy.deepcopy(model)
    compile_decode(model)
    found, idx = [], torch.randint(0, 100, (2, 300), device=device)
    for gpt in (model, plain):
        gpt.assign_kv_caches([cache.to(device) for cache in create_kv_caches(f"dense-{storage}", gpt.config, 2, 800)])
        gpt(idx[:, :200], 0)
        steps = [gpt(idx[:, i : i + 1], i) for i in range(200, 300)]
        found.append(torch.cat(steps, 1).flatten(0, 1).clone())
    # numbers between two codes may round the other way
    assert torch.nn.functional.cosine_similarity(*found, dim=-1).min() > 0.98
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_weights(mode, device):
    model = tiny_gpt(block_size=512, n_layer=1).to(device)
    quantize_model(model, mode)
    plain = copy.deepcopy(model)
    compile_decode(model)
    assert run(model, [[3, 1, 4]], 60) == run(plain, [[3, 1, 4]], 60)
    is_one_graph(device)


def test_gemma_scales_its_embeddings_in_the_graph(device):
    window = {"sliding_window_size": 8, "sliding_window_indices": [1, 0], "scale_embeddings": True, "norm_qk": True}
    model = tiny_gpt(block_size=512, **window).to(device)
    plain = copy.deepcopy(model)
    compile_decode(model)
    assert run(model, [[3, 1, 4]], 60) == run(plain, [[3, 1, 4]], 60)
    is_one_graph(device)
