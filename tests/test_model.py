"""GPT: parameter names, forward passes with and without caches, what the caches' owner promises."""

import copy
import gc
import itertools
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from tiny import StaticShapes, create_kv_caches, greedy_without_caches, in_chunks, tiny_gpt

import litgpt.model
from litgpt import masks
from litgpt.attention import MultiHeadSelfAttention
from litgpt.config import Config
from litgpt.generate.base import generate
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache import DenseKVCache, KVCache, LastRecentlyInsertedKVCache, positional, positional_plan, spec
from litgpt.model import GPT, RMSNorm

ARCHITECTURES = {
    line["title"]: line
    for line in map(json.loads, (Path(__file__).parent / "data" / "state_dict_keys.jsonl").read_text().splitlines())
    if line["title"].split()[0] not in ("LoRA", "Adapter")
}
V, LENGTH = 96, 40
CUTS = [(LENGTH,), (1,) * LENGTH, (17, 23), (5, 1, 1, 30, 3)]
every_architecture = pytest.mark.parametrize("title", ARCHITECTURES)


def architecture(title: str, **kwargs) -> GPT:
    """A tiny instance of an architecture; sliding windows are a few tokens long."""
    line = ARCHITECTURES[title]
    config = Config.from_name(line["name"])
    fields = {"n_layer": 2, "block_size": 128, "padded_vocab_size": V, "vocab_size": V, **line["config"]}
    if config.n_expert:
        fields |= {"n_expert": 4, "n_expert_per_token": 2}
    if config.moe_intermediate_size:
        fields["moe_intermediate_size"] = line["shapes"]["transformer.h.0.mlp.experts.0.proj.weight"][1]
    if config.attention_scores_scalar:
        fields["attention_scores_scalar"] = line["config"]["head_size"]
    if config.sliding_window_size:
        fields |= {"sliding_window_size": 6, "n_layer": 7}
    model = GPT(Config.from_name(line["name"], **fields, **kwargs))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def tokens(T=LENGTH, B=2):
    return torch.randint(0, V, (B, T))


def close(x, y, atol=1e-4):
    torch.testing.assert_close(x, y, atol=atol, rtol=1e-4)


def evicting(model, cache_length, batch_size=2, **kwargs):
    return [
        LastRecentlyInsertedKVCache(model.config, batch_size, cache_length, block_idx, **kwargs)
        for block_idx in range(model.config.n_layer)
    ]


# -- parameters


@every_architecture
def test_parameters_have_the_names_and_shapes_of_litgpt_checkpoints(title):
    model = architecture(title)
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    expected = dict(ARCHITECTURES[title]["shapes"])
    for block_idx in range(1, model.config.n_layer):
        block = {k: v for k, v in ARCHITECTURES[title]["shapes"].items() if k.startswith("transformer.h.0.")}
        expected |= {k.replace(".h.0.", f".h.{block_idx}."): v for k, v in block.items()}
    assert shapes == expected
    model.set_kv_caches(1)
    model(tokens(3, 1), 0)
    assert list(model.state_dict()) == list(shapes), "caches and the RoPE table are no part of a checkpoint"


def test_checkpoints_of_old_versions_have_their_queries_keys_and_values_sorted():
    model, old = tiny_gpt(bias=True), tiny_gpt(bias=True)
    H, G, D = 4, 2, 16
    weights = old.state_dict()
    for name in list(weights):
        if ".attn.qkv." in name:
            q, k, v = weights.pop(name).split((H * D, G * D, G * D))
            groups = []
            for g in range(G):
                groups += [q[g * 2 * D : (g + 1) * 2 * D], k[g * D : (g + 1) * D], v[g * D : (g + 1) * D]]
            weights[name.replace("qkv", "attn")] = torch.cat(groups)
    model.load_state_dict(weights)
    idx = tokens()
    assert torch.equal(model(idx), old(idx))


def test_every_parameter_learns():
    model = tiny_gpt().requires_grad_(True).train()
    model(tokens(9)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.count_nonzero() for parameter in model.parameters())


def test_rms_norm_is_its_formula():
    x = torch.randn(3, 5, 8, dtype=torch.bfloat16)
    for offset in (False, True):
        norm = RMSNorm(8, eps=1e-3, add_unit_offset=offset)
        torch.nn.init.normal_(norm.weight)
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (norm.weight.double() + offset)
        torch.testing.assert_close(norm.to(torch.bfloat16)(x).double(), expected, atol=0.04, rtol=0.02)
        norm.reset_parameters()
        assert (norm.weight == (0 if offset else 1)).all()


# -- rotary position embedding


@pytest.mark.parametrize("interleave", [False, True])
def test_rope_turns_pairs_by_their_position_times_their_frequency(interleave):
    """Pairs are complex numbers: halves (i, i + n/2), or neighbours (2i, 2i + 1)."""
    H, D, n, T = 2, 12, 8, 7
    model = GPT(
        Config(
            n_layer=1,
            n_head=H,
            n_embd=H * D,
            rotary_percentage=n / D,
            block_size=16,
            padded_vocab_size=V,
            vocab_size=V,
            rope_interleave=interleave,
            rope_base=100,
        )
    ).eval()
    attention = model.transformer.h[0].attn
    x = torch.randn(1, T, H * D)
    q, k, v = attention.qkv(x).view(T, 3 * H, D).transpose(0, 1).double().split(H)
    angles = torch.arange(T).double()[:, None] * 100.0 ** (-torch.arange(n // 2).double() * 2 / n)
    turns = torch.polar(torch.ones_like(angles), angles)

    def turned(y):
        head = y[..., :n].unflatten(-1, (-1, 2)) if interleave else y[..., :n].unflatten(-1, (2, -1)).mT
        return torch.cat(
            (torch.view_as_real(torch.view_as_complex(head.contiguous()) * turns).flatten(-2), y[..., n:]), -1
        )

    scores = turned(q) @ turned(k).mT / math.sqrt(D)
    weights = scores.masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf).softmax(-1)
    expected = attention.proj((weights @ v).float().transpose(0, 1).flatten(1))
    close(attention(x, model.rope_rows(0, T))[0], expected, 1e-5)


def test_positions_matter_by_their_differences_only():
    """A prompt after a long one that is out of the window gives what it gives alone."""
    model, idx = tiny_gpt(sliding_window_size=4, n_layer=1), tokens(90, 1)
    close(model(idx)[:, 60:], model(idx[:, 57:])[:, 3:])


def test_rope_table_grows_when_needed_and_seldom(monkeypatch):
    model = tiny_gpt(block_size=64)
    assert model.rope_table.length == 0
    model.max_seq_length = 10
    assert (model.max_seq_length, model.rope_table.length) == (10, 10)
    model.max_seq_length = 5
    assert model.rope_table.length == 10
    for value in (0, 65):
        with pytest.raises(ValueError, match=f"1..64 .*{value}"):
            model.max_seq_length = value
    model.max_seq_length = 64
    calls, build = [], litgpt.model.build_rope_cache
    monkeypatch.setattr(
        litgpt.model, "build_rope_cache", lambda *args, **kwargs: calls.append(1) or build(*args, **kwargs)
    )
    model.assign_kv_caches(evicting(model, 4, 1))
    in_chunks(model, tokens(150, 1), (1,) * 150)
    assert len(calls) <= 3


def test_cosines_are_there_from_the_start_and_may_be_set():
    """LitGPT's scripts read `cos`, ask for its columns, and set both after making a model on `meta`."""
    for size in (1.0, 0.75, 0.25):
        model = tiny_gpt(rotary_percentage=size)
        n = model.config.rope_n_elem
        assert model.cos.shape[0] == model.max_seq_length
        assert model.rope_cache_length() == n == model.rope_rows(0, 3)[0][0].shape[-1]
    idx = tokens(9, 1)
    before = model(idx)
    model.cos, model.sin = (table.flip(0) for table in model.rope_cache())
    assert not torch.allclose(model(idx), before)
    model.cos, model.sin = model.rope_cache()
    close(model(idx), before)


# -- forward with caches


@every_architecture
def test_caches_change_nothing_however_the_sequence_is_cut(title, monkeypatch):
    monkeypatch.setattr(spec, "WINDOW_SLACK", 3)
    model, idx = architecture(title), tokens()
    expected = model(idx)
    model.set_kv_caches(2)
    for cuts in CUTS:
        close(in_chunks(model, idx, cuts), expected)
    model.layer_runner = StaticShapes()
    close(in_chunks(model, idx, (9, *(1,) * 31)), expected)


@every_architecture
def test_rows_of_a_ragged_batch_go_their_own_ways(title, monkeypatch):
    monkeypatch.setattr(spec, "WINDOW_SLACK", 3)
    model, idx = architecture(title), tokens(B=4)
    expected, lengths = model(idx), torch.tensor([3, 17, 8, 8])
    model.set_kv_caches(5)
    model.caches.start(4)
    for rows in ([1], [3, 2], [0]):
        T = int(lengths[rows[0]])
        close(model(idx[rows, :T], 0, rows=rows), expected[rows, :T])

    def bring(rows, T):
        at = lengths[rows, None] + torch.arange(T)
        chunk = idx[rows].gather(1, at)
        named = None if rows == [0, 1, 2, 3] else rows
        assert max(lengths) == model.next_token_pos
        logits = model(chunk, int(max(lengths[rows])), rows=named)
        close(logits, expected[rows].gather(1, at[..., None].expand(-1, -1, V)))
        lengths[rows] += T

    for rows, T in [([0, 1, 2, 3], 1), ([0, 1, 2, 3], 5), ([2, 0], 9), ([0, 1, 2, 3], 1), ([3], 1)]:
        bring(rows, T)
    model.layer_runner = StaticShapes()
    bring([0, 1, 2, 3], 1)
    model.caches.reorder([2, 2, 1])
    idx, expected, lengths = idx[[2, 2, 1]], expected[[2, 2, 1]], lengths[[2, 2, 1]]
    at = lengths[:, None]
    close(model(idx.gather(1, at), int(max(lengths))), expected.gather(1, at[..., None].expand(-1, -1, V)))


def test_what_comes_back_is_what_was_asked_for():
    model, idx = tiny_gpt(n_layer=3), tokens(10)
    expected, final = model(idx), model(idx, skip_lm_head=True)
    assert (expected.shape, final.shape) == ((2, 10, 100), (2, 10, 64))
    close(model.lm_head(final), expected)
    model.set_kv_caches(2)
    for input_pos in (None, 0, torch.arange(10)):
        close(model(idx, input_pos), expected)
        close(model(idx, input_pos, skip_lm_head=True), final)
        close(model(idx, input_pos, last_token_only=True), expected[:, -1:])
        close(model(idx, input_pos, skip_lm_head=True, last_token_only=True), final[:, -1:])
        chunks = model(idx, input_pos, 4)
        assert [chunk.shape[1] for chunk in chunks] == [4, 4, 2]
        close(torch.cat(chunks, 1), expected)
    close(model(idx[0]), expected[:1])
    close(model(idx[0, :4], 0), expected[:1, :4])
    close(model(idx[0, 4:], torch.arange(4, 10), input_pos_maxp1=10), expected[:1, 4:])
    close(model(idx[:1, :1], torch.tensor([0])), expected[:1, :1])
    model.caches.start(2)
    packed = model(idx.reshape(1, -1)[:, 6:], 0, rows=[1, 0], row_sizes=[4, 10], last_token_only=True)
    close(packed, torch.cat([model(idx[:1, 6:])[:, -1:], expected[1:, -1:]]))
    for wrong in (torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3, 2])):
        with pytest.raises(ValueError, match="consecutive"):
            model(idx[:, :2], wrong)


def test_hooks_see_the_input_of_every_layer_and_the_output_of_the_last():
    seen = []
    model = tiny_gpt(n_layer=3, start_of_layer_hook=lambda *args: seen.append(args))
    idx = tokens(6)
    model.requires_grad_(True)
    model(idx)
    model.set_kv_caches(2)
    with torch.no_grad():
        model(idx[:, :4], 0)
        model(idx[:, 4:], 4)
    assert [args[1:] for args in seen] == [(layer, pos) for pos in (None, 0, 4) for layer in range(4)]
    assert not any(args[0].requires_grad for args in seen)
    whole = [args[0] for args in seen[:4]]
    close(whole[0], model.transformer.wte(idx))
    close(model.lm_head(model.transformer.ln_f(whole[3])), model(idx))
    for layer in range(4):
        close(torch.cat((seen[4 + layer][0], seen[8 + layer][0]), 1), whole[layer])
    seen.clear()
    model.set_start_of_layer_hook(None)
    model(idx)
    assert not seen
    assert "start_of_layer_hook" not in model.config.to_dict()


# -- making and assigning caches


def test_default_caches_are_made_resized_and_dropped():
    model = tiny_gpt()
    assert not model.are_kv_caches_assigned()
    assert (
        model.kv_cache_max_tokens_forward()
        is model.kv_cache_max_prefill_length()
        is model.get_kv_cache_params(0)
        is None
    )
    model.set_kv_caches(3, max_seq_length=20)
    assert model.are_kv_caches_assigned()
    assert model.kv_cache_max_tokens_forward() == model.kv_cache_max_prefill_length() == 20
    first = model.kv_caches()
    model(tokens(7), 0)
    model.set_kv_caches(3, max_seq_length=20)
    assert all(a is b for a, b in zip(model.kv_caches(), first, strict=True)), "those that fit are used again"
    assert model.next_token_pos == 0
    model.set_kv_cache(batch_size=2, max_seq_length=30, device=torch.device("cpu"), dtype=torch.bfloat16)
    params = model.get_kv_cache_params(1)
    assert (params.batch_size, params.cache_length, params.dtype) == (2, 30, torch.bfloat16)
    model.set_kv_caches(2)
    params = model.get_kv_cache_params(1)
    assert (params.cache_length, params.dtype) == (128, torch.float32)
    model.clear_kv_cache()
    assert not model.are_kv_caches_assigned()
    model.max_seq_length = 50
    model.set_kv_caches(1)
    assert model.get_kv_cache_params(0).cache_length == 50
    with pytest.raises(ValueError, match="51 .*50"):
        model.set_kv_caches(1, max_seq_length=51)
    with pytest.raises(ValueError, match="batch_size.*0"):
        model.set_kv_caches(0)


def test_layers_with_a_window_have_default_caches_of_its_size():
    model = tiny_gpt(n_layer=4, sliding_window_size=8, sliding_window_indices=[1, 1, 0, 1])
    model.set_kv_caches(1)
    lengths = [cache.cache_length for cache in model.kv_caches()]
    assert lengths == [8 + spec.WINDOW_SLACK] * 2 + [128] + [8 + spec.WINDOW_SLACK]
    assert (model.kv_cache_max_tokens_forward(), model.kv_cache_max_prefill_length()) == (lengths[0], 128)
    model.set_kv_caches(1, max_seq_length=20)
    assert [cache.cache_length for cache in model.kv_caches()] == [20] * 4
    # within the slack, a step back is exact
    model.set_kv_caches(1)
    idx = tokens(100, 1)
    expected = model(idx)
    in_chunks(model, idx, (100,))
    assert model.caches.crop(100 - spec.WINDOW_SLACK)
    assert model.next_token_pos == 100 - spec.WINDOW_SLACK
    close(in_chunks(model, idx, (30, 34), 36), expected[:, 36:])
    assert not model.caches.crop(20)
    assert model.next_token_pos == 0


def test_caches_that_do_not_fit_are_refused():
    model = tiny_gpt()
    good = [DenseKVCache(model.config, 2, block_idx) for block_idx in range(2)]

    def refused(message, caches):
        with pytest.raises(ValueError, match=message):
            model.assign_kv_caches(caches)
        assert not model.kv_caches()

    refused("2 caches.* 1$", good[:1])
    refused("2 caches.* 3$", [*good, good[0]])
    refused("layer 0.*block_idx = 1.* 0", good[::-1])
    refused("layer 1.*batch_size = 3.* 2", [good[0], DenseKVCache(model.config, 3, 1)])
    refused(
        "layer 1.*dtype = torch.bfloat16.*float32", [good[0], DenseKVCache(model.config, 2, 1, dtype=torch.bfloat16)]
    )
    refused("layer 1.*head_size = 8.* 16", [good[0], DenseKVCache(model.config, 2, 1, head_size=8)])
    for name, kwargs in {"n_query_groups = 4.* 2": {"n_query_groups": 4}, "n_head = 2.* 4": {"n_head": 2}}.items():
        other = tiny_gpt(**kwargs).config
        refused(f"layer 0.*{name}", [DenseKVCache(other, 2, block_idx, head_size=16) for block_idx in range(2)])

    model.assign_kv_caches(good)
    with pytest.raises(ValueError, match="assigned already"):
        model.assign_kv_caches(good)
    with pytest.raises(ValueError, match="assign_kv_caches"):
        model.set_kv_caches(2)
    model.clear_kv_caches()
    assert model.are_kv_caches_assigned(), "only default caches are dropped"
    model.clear_kv_caches(assigned=True)
    model.set_kv_caches(2)
    with pytest.raises(ValueError, match="assigned already"):
        model.assign_kv_caches(good)


def test_wrong_calls_change_nothing():
    model, idx = tiny_gpt(block_size=24), tokens(30)
    with pytest.raises(ValueError, match="set_kv_caches"):
        model(idx[:, :5], 0)
    with pytest.raises(ValueError, match="30.*24"):
        model(idx)
    model.set_kv_caches(2, max_seq_length=20)
    expected = in_chunks(model, idx, (9, 4))
    model(idx[:, :9], 0)
    for error, message, chunk, input_pos in [
        (ValueError, "8.* 9", idx[:, :1], 8),
        (ValueError, "-1", idx[:, :1], -1),
        (ValueError, "3 .* 2", tokens(4, 3), 9),
        (ValueError, "3 .*2", tokens(4, 3), 0),
        (ValueError, r"\(2, 0\)", idx[:, :0], 9),
        (ValueError, r"\(1, 2, 3\)", torch.zeros(1, 2, 3, dtype=torch.int64), 9),
        (IndexError, "21 .*20", idx[:, :12], 9),
        (IndexError, "30 .*20", idx, 0),
    ]:
        with pytest.raises(error, match=message):
            model(chunk, input_pos)
    assert torch.equal(model(idx[:, 9:13], 9), expected[:, 9:13])
    # one layer elsewhere than the others
    model.kv_caches()[1].crop(10)
    with pytest.raises(ValueError, match="13.* 10"):
        model(idx[:, 13:14], 13)
    assert [cache.next_token_pos for cache in model.kv_caches()] == [13, 10]


def test_a_cache_of_another_dtype_is_a_clear_error():
    model, idx = tiny_gpt(), tokens(5)
    model.set_kv_caches(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        model(idx, 0)
    model.set_kv_caches(2)
    model.to(torch.bfloat16)  # caches go along
    assert model(idx, 0).dtype == model.get_kv_cache_params(0).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("title", ["Llama 3", "Gemma-3"])
def test_autocast_works_with_caches_of_its_dtype(title):
    model, idx = architecture(title), tokens()
    model.set_kv_caches(2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(idx)
        close(in_chunks(model, idx, (17, 1, 22)), expected, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_a_layer_leaves_the_caches_empty(error):
    model, idx = tiny_gpt(), tokens(12)
    model.set_kv_caches(2)
    expected = in_chunks(model, idx, (9, 3))
    for start in (0, 9):

        def fail(x, block_idx, input_pos, start=start):
            if block_idx == 1 and input_pos == start:
                raise error("in layer 1")

        model.set_start_of_layer_hook(fail)
        with pytest.raises(error, match="in layer 1"):
            in_chunks(model, idx, (9, 3))
        assert [cache.next_token_pos for cache in model.kv_caches()] == [0, 0]
        with pytest.raises(ValueError, match="9.* 0"):
            model(idx[:, 9:], 9)
        model.set_start_of_layer_hook(None)
        assert torch.equal(in_chunks(model, idx, (9, 3)), expected)


def test_evicting_caches_go_on_beyond_the_context():
    """A cache of the last C tokens is a sliding window of C in every layer: compare with that, without caches."""
    C, idx = 8, tokens(60)
    windowed = tiny_gpt(sliding_window_size=C)
    model = tiny_gpt(block_size=16)
    model.load_state_dict(windowed.state_dict())
    model.assign_kv_caches(evicting(model, C))
    for cuts in [(8, *(1,) * 52), (5, 30, 25), (1, 7, 1, 20, 1, 30)]:
        close(in_chunks(model, idx, cuts), windowed(idx))
    with pytest.raises(ValueError, match="17 .*16"):  # without caches
        model(idx[:, :17])


@pytest.mark.parametrize("kind", ["sinks", "dense", "mixed"])
def test_other_caches_do_not(kind):
    model, idx = tiny_gpt(block_size=16), tokens(20)
    caches = evicting(model, 8, **({"n_sink": 2} if kind == "sinks" else {}))
    if kind != "sinks":
        caches[-1] = DenseKVCache(model.config, 2, 1, max_sequence_length=64)
    if kind == "dense":
        caches[0] = DenseKVCache(model.config, 2, 0, max_sequence_length=64)
    model.assign_kv_caches(caches)
    model(idx[:, :15], 0)
    with pytest.raises(ValueError, match="17 .*max_seq_length = 16"):
        model(idx[:, 15:17], 15)
    model(idx[:, 15:16], 15)
    with pytest.raises(ValueError, match="17 .*max_seq_length = 16"):
        model(idx[:, 16:17], 16)


# -- cost


def test_what_is_the_same_for_all_layers_is_planned_once(monkeypatch):
    model = tiny_gpt(n_layer=6, sliding_window_size=8, sliding_window_indices=[1, 1, 0, 1, 1, 0])
    calls = []
    for module, name in ((positional, "plan_call"), (positional_plan, "position_bias"), (masks, "causal_tiles")):
        original = getattr(module, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    model.set_kv_caches(3)
    idx, lengths = tokens(110, 3), [20, 1, 1, 50, 30, 1]
    for start, T in zip([0, 20, 21, 22, 72, 102], lengths, strict=True):
        calls.clear()
        model(idx[:, :T], start)
        assert calls.count("plan_call") == 2, "one plan for layers with the window, one for those without"
        assert len(calls) <= 4


def test_nothing_is_read_back_from_the_device():
    """A model on the meta device has no numbers that could be read."""
    model = tiny_gpt(n_layer=2, sliding_window_size=8, sliding_window_indices=[1, 0]).to("meta")
    model.set_kv_caches(3)
    idx = tokens(110, 3).to("meta")
    assert in_chunks(model, idx, (20, 1, 60, 1)).shape == (3, 82, 100)
    model.caches.start(3)
    for rows, T in [([1], 9), ([2, 0], 4)]:
        model(idx[rows, :T], 0, rows=rows)
    for static, T in [(False, 1), (True, 1), (False, 5)]:
        model.layer_runner = StaticShapes() if static else None
        model(idx[:, :T], model.next_token_pos)


def test_a_model_is_freed_when_it_is_dropped():
    model = tiny_gpt()
    model.set_kv_caches(1)
    model(tokens(3, 1), 0)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None, "a cycle of references keeps the weights until the next garbage collection"
    finally:
        gc.enable()


def test_a_copy_of_a_model_runs_its_own_layers():
    model = tiny_gpt()
    model.layer_runner = StaticShapes()
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    twin.set_kv_caches(2)
    idx = tokens(6)
    close(in_chunks(twin, idx, (4, 1, 1)), twin(idx))


class ForeignCache(KVCache):
    """A cache made elsewhere that implements the contract and no planning: it keeps everything, in a list."""

    stored: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, query, key, value, token_idx, input_pos):
        if input_pos:
            key, value = (torch.cat(pair, 2) for pair in zip(self.stored, (key, value), strict=True))
        self.stored = key, value
        attention = MultiHeadSelfAttention(self.config)
        return attention(query, DefaultKeysAndValues(key, value), self.block_idx, input_pos)[0]

    next_token_pos = property(lambda self: 0 if self.stored is None else self.stored[0].shape[2])
    max_tokens_forward = property(lambda self: 100)
    max_prefill_length = property(lambda self: None)
    device = property(lambda self: torch.device("cpu"))

    def get_keys_values(self):
        return DefaultKeysAndValues(*self.stored)

    def token_positions(self):
        return torch.arange(self.next_token_pos).expand(*self.stored[0].shape[:2], -1)

    def size_estimate(self):
        return 0, {}

    @classmethod
    def size_estimate_apriori(cls, params):
        return 0, {}


def test_a_cache_that_only_implements_the_abstract_methods_serves_a_model():
    model = tiny_gpt()
    idx = torch.randint(0, 100, (2, 12))
    model.assign_kv_caches([ForeignCache(model.config, 2, 50, block_idx) for block_idx in range(2)])
    chunks = [model(idx[:, :5], 0), model(idx[:, 5:11], 5), model(idx[:, 11:], 11)]
    close(torch.cat(chunks, 1), model(idx))
    with pytest.raises(ValueError, match="input_pos=3.*12"):
        model(idx, 3)
    with pytest.raises(ValueError, match="rows"):
        model(idx, 0, rows=[0, 1])
    prompt = idx[0, :5]
    assert torch.equal(generate(model, prompt, 20, temperature=0.0)[5:], greedy_without_caches(model, prompt, 15))


# -- rows one after the other


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("evicts", [False, True])
def test_rows_one_after_the_other_give_what_each_gives_alone(window, evicts):
    flags = {} if window is None else {"sliding_window_size": window, "sliding_window_indices": [1, 0]}
    model = tiny_gpt(n_layer=2, **flags).eval()
    sizes, rows, more = [5, 19, 2, 5], [2, 0, 3, 1], [3, 1, 4, 3]
    prompts = [tokens(size + extra, 1)[0] for size, extra in zip(sizes, more, strict=True)]

    def caches(batch_size):
        model.clear_kv_caches(assigned=True)
        if evicts:
            model.assign_kv_caches(create_kv_caches("lastrec", model.config, batch_size, 9, dtype=torch.float32))
        else:
            model.set_kv_caches(batch_size, max_seq_length=30)

    alone = []
    for prompt, size in zip(prompts, sizes, strict=True):
        caches(1)
        alone.append(torch.cat((model(prompt[None, :size], 0), model(prompt[None, size:], size)), dim=1)[0])
    caches(4)
    model.caches.start(4)
    begun = torch.cat([prompt[:size] for prompt, size in zip(prompts, sizes, strict=True)])[None]
    first = model(begun, 0, rows=rows, row_sizes=sizes)[0].split(sizes)
    ends = [end - 1 for end in itertools.accumulate(sizes)]
    model.caches.start(4)
    last = model(begun, 0, rows=rows, row_sizes=sizes, last_token_only=True)
    assert last.shape == (4, 1, model.config.padded_vocab_size)
    torch.testing.assert_close(last[:, 0], torch.cat(first)[ends])
    rest = torch.cat([prompt[size:] for prompt, size in zip(prompts, sizes, strict=True)])[None]
    second = model(rest, 19, rows=rows, row_sizes=more)[0].split(more)
    for i, expected in enumerate(alone):
        torch.testing.assert_close(torch.cat((first[i], second[i])), expected, atol=1e-5, rtol=1e-4)


def test_rows_whose_sizes_do_not_fit_are_refused():
    model = tiny_gpt()
    model.set_kv_caches(2, max_seq_length=20)
    model.caches.start(2)
    idx = tokens(7, 1)
    for arguments in ({"row_sizes": [3, 4]}, {"rows": [0, 1], "row_sizes": [3, 3]}):
        with pytest.raises(ValueError, match=r"row_sizes=\[3, .*\(1, 7\)"):
            model(idx, 0, **arguments)
    for rows, sizes in (([0], [3, 4]), ([0, 1, 1], [3, 4]), ([0, 1], [7, 0])):
        with pytest.raises(ValueError, match=f"at least one token for each of {len(rows)} rows"):
            model(idx, 0, rows=rows, row_sizes=sizes)
    with pytest.raises(IndexError, match="21 tokens do not fit"):
        model(tokens(24, 1), 0, rows=[0, 1], row_sizes=[21, 3])
    model(idx, 0, rows=[0, 1], row_sizes=[3, 4])
