import shutil

import pytest
import torch
from tiny import create_kv_caches, tiny_gpt
from torch._dynamo.utils import counters

from litgpt.engine.prefill import prefill
from litgpt.generate.base import batched_generate_fn
from litgpt.runners.compiled import compile_decode

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.timeout(600),
]


def run(model, prompts, length):
    steps = batched_generate_fn(
        model, prompts, length, sample_args={"temperature": 0.0}, include_prompt=False, include_eos=True
    )
    return [[None if x is None else x.tolist() for x in step] for step in steps]


# not knorm: in one layer, keys of equal tokens have equal norms, so that rounding decides which of them stays
@pytest.mark.parametrize("kv_cache", ["dense", "lastrec", "h2o"])
def test_compiled_decoding_is_one_graph_for_all_positions_and_runs(kv_cache):
    plain, model = (tiny_gpt(block_size=512, n_layer=1, n_embd=16, n_head=2, intermediate_size=32) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    if kv_cache != "dense":
        for gpt in (plain, model):
            gpt.assign_kv_caches(create_kv_caches(kv_cache, gpt.config, 2, 64, n_sink=2))
    torch._dynamo.reset()
    counters.clear()
    compile_decode(model)
    prompts = [torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9, 2, 6])]
    run(model, prompts[:1], 20)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for length in (512, 130):  # other runs, other ends
        assert run(model, prompts[1:], length) == run(plain, prompts[1:], length)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kv_cache", ["dense", "h2o"])
def test_a_ragged_batch_decodes_compiled_as_it_does_plain(kv_cache):
    plain, model = tiny_gpt(n_layer=1), tiny_gpt(n_layer=1)
    model.load_state_dict(plain.state_dict())
    if kv_cache != "dense":
        for gpt in (plain, model):
            gpt.assign_kv_caches(create_kv_caches(kv_cache, gpt.config, 3, 16, tail=3))
    torch._dynamo.reset()
    compile_decode(model)
    prompts = [torch.tensor([3, 1, 4]), torch.tensor([1, 5, 9, 2, 6]), torch.tensor([7])]
    assert run(model, prompts, 40) == run(plain, prompts, 40)


def test_single_tokens_of_a_prefill_are_not_those_that_are_compiled():
    """What is left of a prompt after its chunks, and a prompt of one token that joins others."""
    plain, model = tiny_gpt(n_layer=1), tiny_gpt(n_layer=1)
    model.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    compile_decode(model)
    prompts = [torch.arange(5), torch.arange(9)]
    results = []
    for gpt in (plain, model):
        gpt.set_kv_caches(3, max_seq_length=20)
        logits = prefill(gpt, prompts, chunksize=4)
        gpt.caches.extend(1)
        results.append(torch.cat((logits, prefill(gpt, [torch.tensor([7])], rows=[2]))))
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_on_a_gpu_steps_are_replayed_as_cuda_graphs():
    plain, model = tiny_gpt(n_layer=1).cuda(), tiny_gpt(n_layer=1).cuda()
    model.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compile_decode(model)
    prompt = [torch.tensor([3, 1, 4], device="cuda")]
    assert run(model, prompt, 60) == run(plain, prompt, 60)
    assert not counters["inductor"]["cudagraph_skips"]
