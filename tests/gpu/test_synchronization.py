"""A forward pass never waits for the GPU: the host plans a call while the one before it is still running."""

from contextlib import contextmanager

import pytest
import torch
from tiny import tiny_gpt

from litgpt.kvcache import CacheSpec
from litgpt.kvcache.testing import KV_CACHE_NAMES

pytestmark = pytest.mark.gpu

# what moves keys and values between host and GPU has to wait for them
NAMES = [name for name in KV_CACHE_NAMES if not name.endswith("-offload")]


@contextmanager
def never_waiting(device):
    """Anything that waits for the GPU is an error."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def a_model(name, device, rows, **kwargs):
    model = tiny_gpt(block_size=512, **kwargs).to(device)
    spec = CacheSpec.parse(name)
    length = 48 if spec.evicts else 400
    args = {"window": 32} if name.endswith("kivi") else {}
    model.assign_kv_caches(CacheSpec.parse(name, cache_length=length, **args).create(model, rows))
    return model


def go(model, prompt, chunk, token):
    """A prompt, decode steps up to an eviction, a chunk of a further text, and one more step."""
    model(prompt, 0, last_token_only=True)
    for _ in range(8):
        model(token, model.next_token_pos)
    model(chunk, model.next_token_pos, last_token_only=True)
    model(token, model.next_token_pos)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_prefill_chunks_and_decode_steps_with_every_cache(name, device):
    model = a_model(name, device, 2)
    prompt, chunk, token = (torch.randint(0, 100, (2, T), device=device) for T in (70, 40, 1))
    go(model, prompt, chunk, token)  # tables and workspaces are made in the first calls
    with never_waiting(device):
        go(model, prompt, chunk, token)


@pytest.mark.parametrize("name", ["dense-default", "dense-int4", "dense-kivi", "lastrec-default", "h2o-default"])
@torch.inference_mode()
def test_rows_of_different_lengths(name, device):
    model = a_model(name, device, 3)
    prompts, token = torch.randint(0, 100, (1, 45), device=device), torch.randint(0, 100, (3, 1), device=device)

    def go():
        model.caches.start(3)
        model(prompts, 0, last_token_only=True, rows=[0, 1, 2], row_sizes=[5, 30, 10])
        for _ in range(30):
            model(token, model.next_token_pos)
        model(prompts[:, :14], model.next_token_pos, last_token_only=True, rows=[1, 2], row_sizes=[9, 5])

    go()
    with never_waiting(device):
        go()


KINDS = {
    "windows": {"sliding_window_size": 8, "sliding_window_indices": [1, 0], "scale_embeddings": True},
    "sinks": {"attention_sinks": True},
    "softcap": {"attention_logit_softcapping": 20.0},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_every_kind_of_layer(kind, device):
    model = a_model("dense", device, 2, **KINDS[kind])
    prompt, chunk, token = (torch.randint(0, 100, (2, T), device=device) for T in (70, 40, 1))
    go(model, prompt, chunk, token)
    with never_waiting(device):
        go(model, prompt, chunk, token)


@torch.inference_mode()
def test_experts_in_bfloat16(device):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("no grouped products on this GPU")
    experts = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 64}
    model = a_model("dense", device, 2, **experts).bfloat16()
    prompt, chunk, token = (torch.randint(0, 100, (2, T), device=device) for T in (70, 40, 1))
    go(model, prompt, chunk, token)
    with never_waiting(device):
        go(model, prompt, chunk, token)
