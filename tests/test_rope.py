import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litgpt.config import Config
from litgpt.engine.caches import prepare_caches
from litgpt.engine.prefill import prefill
from litgpt.model import GPT
from litgpt.rope import apply_rope, build_rope_cache

LONGROPE = {
    "factor": 4.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 3.0, 8.0, 16.0],
    "original_max_seq_len": 16,
}
YARN = {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 64}
SCALINGS = {
    "yarn": (YARN, 10000.0),
    "yarn up to the last frequencies": (YARN | {"beta_fast": 4}, 10.0),
    "yarn not truncated": (YARN | {"truncate": False}, 500.0),
    "yarn with mscale": (YARN | {"mscale": 1.3, "mscale_all_dim": 0.6}, 10000.0),
    "yarn with half of mscale": (YARN | {"mscale_all_dim": 0.6}, 10000.0),
    "yarn with a factor on attention": (YARN | {"attention_factor": 1.7}, 10000.0),
    "yarn at one frequency": (YARN | {"beta_fast": 1, "truncate": False}, 10000.0),
    "longrope": (LONGROPE, 10000.0),
    "longrope with a factor on attention": (LONGROPE | {"attention_factor": 0.8}, 10000.0),
    "longrope without extension": (LONGROPE | {"factor": 1.0}, 10000.0),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 256},
        10000.0,
    ),
    "linear": ({"factor": 4.0}, 10000.0),
}


@pytest.mark.parametrize("length", [10, 40])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_those_of_transformers(name, length):
    adjustments, base = SCALINGS[name]
    kind = name.split()[0]
    theirs = dict(adjustments)
    if "original_max_seq_len" in theirs:
        theirs["original_max_position_embeddings"] = theirs.pop("original_max_seq_len")
    rope = {"rope_type": kind, "rope_theta": base, **theirs}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=rope)
    theta, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    angles = torch.outer(torch.arange(length).float(), theta).repeat(1, 2)
    cos, sin = build_rope_cache(length, 8, base=base, extra_config=adjustments)
    torch.testing.assert_close(cos, angles.cos() * scale, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sin, angles.sin() * scale, atol=1e-6, rtol=1e-5)


def longrope_model():
    config = Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        vocab_size=50,
        padded_vocab_size=50,
        block_size=64,
        rotary_percentage=1.0,
        rope_adjustments=LONGROPE,
    )
    model = GPT(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.inference_mode()
def test_sequences_that_will_be_long_are_turned_by_the_long_factors_from_the_start():
    model, tokens = longrope_model(), torch.randint(50, (1, 24))
    prepare_caches(model, 1, 24)
    logits = prefill(model, [tokens[0, :10]])
    for i in range(10, 24):
        logits = model(tokens[:, i : i + 1], i)[:, -1]
    torch.testing.assert_close(logits, model(tokens)[:, -1], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_what_was_cached_under_the_short_factors_is_forgotten_when_the_sequence_gets_long():
    model, tokens = longrope_model(), torch.randint(50, (1, 12))
    prepare_caches(model, 1, 12, roomy=True)
    torch.testing.assert_close(prefill(model, [tokens[0]]), model(tokens)[:, -1], atol=1e-4, rtol=1e-4)
    assert model.next_token_pos == 12
    prepare_caches(model, 1, 16, roomy=True)
    assert model.next_token_pos == 12
    prepare_caches(model, 1, 17, roomy=True)
    assert model.next_token_pos == 0


@torch.inference_mode()
def test_a_call_without_cache_leaves_the_cached_sequence_as_it_is():
    model, tokens = longrope_model(), torch.randint(50, (1, 12))
    model.set_kv_caches(1)
    model(tokens[:, :8], 0)
    model(torch.randint(50, (1, 30)))
    torch.testing.assert_close(model(tokens[:, 8:], 8), model(tokens)[:, 8:], atol=1e-4, rtol=1e-4)


def test_layers_without_rope_do_not_see_positions():
    config = Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, rotary_percentage=1.0, nope_indices=[1, 0])
    first, second = (block.attn for block in GPT(config).transformer.h)
    x = torch.randn(1, 6, 32)
    turned = [torch.full((1, 1, 6, 8), math.cos(1.0)), torch.full((1, 1, 6, 8), math.sin(1.0))]
    still = [torch.ones(1, 1, 6, 8), torch.zeros(1, 1, 6, 8)]
    assert torch.equal(first(x, [turned]), first(x, [still]))
    assert not torch.equal(second(x, [turned]), second(x, [still]))


@pytest.mark.parametrize(("rotary_percentage", "n"), [(0.75, 3), (0.25, 1), (0.5, 2)])
def test_a_model_rotates_an_odd_number_of_elements_as_litgpt_does(rotary_percentage, n):
    config = Config(
        n_layer=1, n_embd=8, n_head=2, block_size=8, padded_vocab_size=8, rotary_percentage=rotary_percentage
    )
    torch.manual_seed(0)
    model = GPT(config)
    attention = model.transformer.h[0].attn
    seen = {}
    attention.register_forward_hook(lambda module, args, output: seen.update(x=args[0], output=output))
    model(torch.arange(6)[None])
    x = seen["x"]
    q, k, v = attention.qkv(x).view(1, 6, 6, 4).transpose(1, 2).split(2, dim=1)
    cos, sin = build_rope_cache(6, n)
    assert cos.shape == (6, max(n, 2))

    def rotated(heads):  # with one element the result is longer by one: the two are equal
        return torch.cat((apply_rope(heads[..., :n], cos[None], sin[None]), heads[..., n:]), dim=-1)

    scores = (rotated(q) @ rotated(k).mT) / 4**0.5
    weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf")).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["output"], expected)


def test_a_table_cut_to_an_odd_number_lacks_the_last_partner():
    cos, sin = build_rope_cache(5, 3)
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 10000 ** (-2 / 3), 1.0])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    x = torch.randn(1, 2, 5, 3)
    a, b, c = x.unbind(-1)
    expected = torch.stack(
        (a * cos[:, 0] - b * sin[:, 0], b * cos[:, 1] - c * sin[:, 1], c * cos[:, 2] + a * sin[:, 2]), -1
    )
    torch.testing.assert_close(apply_rope(x, cos, sin), expected)


def test_a_layer_takes_cosines_and_sines_as_litgpt_gives_them():
    config = Config(n_layer=1, n_embd=16, n_head=2, block_size=8, padded_vocab_size=8, rotary_percentage=0.5)
    model = GPT(config)
    seen = {}
    block = model.transformer.h[0]
    block.register_forward_hook(lambda module, args, output: seen.update(x=args[0], output=output))
    model(torch.arange(6)[None])
    cos, sin = build_rope_cache(6, config.rope_n_elem)
    torch.testing.assert_close(block(seen["x"], cos[None], sin[None]), seen["output"])


def test_layers_with_a_window_have_no_scaling_nor_its_factor():
    adjustments = {"factor": 2.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 8}
    cos, sin = build_rope_cache(16, 8, extra_config=adjustments, rope_local_base_freq=500)
    plain, scaled = build_rope_cache(16, 8, base=500), build_rope_cache(16, 8, extra_config=adjustments)
    assert torch.stack((cos, sin))[..., 1].equal(torch.stack(plain))
    assert torch.stack((cos, sin))[..., 0].equal(torch.stack(scaled))
