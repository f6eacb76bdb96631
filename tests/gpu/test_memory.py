"""What a plan says is what the GPU gives, and what does not fit is refused with the numbers."""

import re

import pytest
import torch
from tiny import tiny_gpt

from litgpt.engine.loading import choose_kv_caches
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.memory import available_bytes
from litgpt.kvcache.testing import KV_CACHE_NAMES
from litgpt.planning import MemoryPlan, measured_bandwidth
from litgpt.runners.quantized_weights import Scheme, quantize_model

pytestmark = pytest.mark.gpu

MODEL = {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_query_groups": 2, "intermediate_size": 512, "block_size": 4096}


def allocated():
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("name", [name for name in KV_CACHE_NAMES if not name.endswith("-offload")])
def test_bytes_of_caches_are_those_of_the_plan(name, on_gpu):
    model = tiny_gpt(**MODEL).bfloat16().to(on_gpu)
    spec = CacheSpec.parse(name, cache_length=2048)
    before = allocated()
    model.assign_kv_caches(spec.create(model, 4))
    found, planned = allocated() - before, MemoryPlan(model.config, spec, torch.bfloat16).caches(4, 2048)
    n_buffers = sum(1 for cache in model.kv_caches() for _ in cache.buffers())
    assert 0 <= found - planned <= 512 * n_buffers  # the allocator rounds up


def test_offloaded_keys_and_values_take_no_memory_of_the_gpu(on_gpu):
    model = tiny_gpt(**MODEL).bfloat16().to(on_gpu)
    before = allocated()
    model.assign_kv_caches(CacheSpec.parse("dense-offload", cache_length=2048).create(model, 4))
    assert allocated() == before
    assert all(buffer.is_pinned() for cache in model.kv_caches() for buffer in cache.buffers())


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_bytes_of_weights_are_those_of_the_plan(mode, on_gpu):
    torch.zeros(1, device=on_gpu)
    before = allocated()
    model = tiny_gpt(**MODEL).bfloat16()
    if mode is not None:
        quantize_model(model, mode)
    model.to(on_gpu)
    scheme = None if mode is None else Scheme(mode)
    found, planned = allocated() - before, MemoryPlan(model.config, CacheSpec(), torch.bfloat16, scheme).weights
    n_tensors = len(list(model.parameters())) + len(list(model.buffers()))
    assert -512 * n_tensors <= found - planned <= 512 * n_tensors


def test_what_is_left_is_what_the_driver_says(on_gpu):
    torch.cuda.empty_cache()
    before = available_bytes(on_gpu)
    x = torch.empty(1 << 30, dtype=torch.uint8, device=on_gpu)
    assert before - available_bytes(on_gpu) == pytest.approx(1 << 30, rel=0.5)  # others may use the GPU too
    del x


def test_caches_that_do_not_fit_are_refused_with_both_numbers(on_gpu):
    model = tiny_gpt(**{**MODEL, "block_size": 1 << 22}).bfloat16().to(on_gpu)
    rows = 4 * available_bytes(on_gpu) // MemoryPlan(model.config, CacheSpec(), torch.bfloat16).caches(1, 1 << 22)
    with pytest.raises(ValueError, match=r"need [\d.,]+ GB, but [\d.,]+ GB are left on cuda") as error:
        choose_kv_caches(model, CacheSpec.parse("dense", cache_length=1 << 22), max(4, rows))
    needed, left = (float(x.replace(",", "")) for x in re.findall(r"([\d.,]+) GB", str(error.value))[:2])
    assert needed > left > 0
    assert "what fits is" in str(error.value)


def test_the_bandwidth_of_a_gpu_is_measured(on_gpu):
    assert measured_bandwidth() > 20e9
