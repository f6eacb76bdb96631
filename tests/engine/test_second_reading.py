"""Prompts that are read twice: the scores are the weights of a plain forward pass over the text and its repetition."""

import pytest
import torch
from tiny import LATENT, VOCABULARY, tiny_gpt, tiny_tokenizer
from torch.nn.functional import pad

from litgpt.api import LLM, Preprocessor
from litgpt.engine import PromptLookup, Session
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.loading import choose_kv_caches
from litgpt.engine.prefixes import PrefixStore
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.kvcache import CacheSpec

PROMPT = torch.arange(40).mul(7).remainder(90).tolist()
KIND = {"kv_cache": "kvzip", "cache_length": 16, "tail": 4, "n_sink": 2, "recent": 3}
WINDOW = {"sliding_window_size": 8, "sliding_window_indices": [1, 0]}


def weights_of_repetition(model, layer, start, stop, n_sink):
    """Largest weights (G, stop - start) of the tokens start..stop, read again after the prompt, on themselves."""
    text = torch.tensor(PROMPT + PROMPT[start:stop])[None]
    seen = {}

    def note(mha, block_idx, query, key, *rest, **kwargs):
        seen[block_idx] = query.detach(), key.detach()
        return plain(mha, block_idx, query, key, *rest, **kwargs)

    import litgpt.model as module

    plain, module.attend_without_cache = module.attend_without_cache, note
    try:
        model(text)
    finally:
        module.attend_without_cache = plain
    query, key = seen[layer]
    n, H, G = len(PROMPT), query.shape[1], key.shape[1]
    shown = [*range(min(n_sink, start)), *range(start, stop), *range(n, text.shape[1])]
    largest = torch.zeros(G, stop - start)
    for h in range(H):
        g = h // (H // G)
        for t in range(n, text.shape[1]):
            keys = key[0, g, [p for p in shown if p <= t]]
            weights = (keys @ query[0, h, t] * model.mha.scale).softmax(-1)
            first = min(n_sink, start)
            largest[g] = torch.maximum(largest[g], weights[first : first + stop - start])
    return largest


@pytest.mark.parametrize("flags", [{}, WINDOW], ids=["", "window"])
@pytest.mark.parametrize("piece", [40, 13])
def test_what_stays_is_what_the_repetition_attends_to(flags, piece):
    model = tiny_gpt(**flags)
    session = Session(model, piece=piece, **KIND)
    session.extend([*PROMPT, 5])
    layer = 1
    cache = session.kv_caches[layer]
    scores = torch.cat(
        [weights_of_repetition(model, layer, i, min(i + piece, 40), 2) for i in range(0, 40, piece)], dim=1
    )
    scores[:, :2] = scores[:, 37:] = torch.inf
    expected = scores.topk(12).indices.sort().values
    assert cache.token_positions()[0].tolist() == expected.tolist()
    if flags:
        assert session.kv_caches[0].token_positions()[0, 0].sort().values.tolist()[-8:] == list(range(32, 40))
    held = cache.get_keys_values().keys()
    dense = Session(model, kv_cache="dense", cache_length=64)
    dense.extend([*PROMPT, 5])
    keys = dense.kv_caches[layer].get_keys_values().keys()
    torch.testing.assert_close(held[0, 0], keys[0, 0, expected[0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flags", [{}, WINDOW, LATENT], ids=["", "window", "latent"])
def test_with_the_budget_scores_what_stays_is_the_best_of_all_heads_and_layers(flags):
    model = tiny_gpt(**flags, n_layer=2)
    session, dense = Session(model, budget="scores", **KIND), Session(model, cache_length=64, kv_cache="dense")
    session.extend([*PROMPT, 5])
    dense.extend([*PROMPT, 5])
    layers = [1] if flags is WINDOW else [0, 1]
    scores = torch.stack([pad(weights_of_repetition(model, layer, 2, 40, 2), (2, 0)) for layer in layers])
    scores = scores.unflatten(1, (model.config.cache_groups, -1)).amax(
        2
    )  # latent attention has one head of keys for all
    scores[..., :2] = scores[..., 37:] = torch.inf
    stays = torch.zeros(scores.numel(), dtype=torch.bool)
    stays[scores.flatten().topk(12 * scores.shape[:2].numel()).indices] = True
    for layer, expected in zip(layers, stays.view(scores.shape), strict=True):
        cache, whole = session.kv_caches[layer], dense.kv_caches[layer].get_keys_values()
        positions, held = cache.token_positions()[0], cache.get_keys_values()
        for g, own in enumerate(expected):
            kept = positions[g][positions[g] >= 0]
            assert kept.tolist() == own.nonzero().flatten().tolist()
            torch.testing.assert_close(held.keys()[0, g, : len(kept)], whole.keys()[0, g, kept], atol=1e-5, rtol=1e-5)


def test_with_the_budget_scores_sessions_are_saved_forked_cropped_and_begun_anew(tmp_path):
    model = tiny_gpt()
    session, other = (Session(model, budget="scores", **KIND) for _ in range(2))
    drawn = list(session.generate(PROMPT, 30, temperature=0.0))
    assert drawn[0] == next(Session(model).generate(PROMPT, 1, temperature=0.0))
    assert session.cache_bytes == Session(model, **KIND).cache_bytes == other.cache_bytes
    assert any(cache.kept_by_head for cache in session.kv_caches)
    drafting = Session(model, budget="scores", **KIND)
    assert list(drafting.generate(PROMPT, 30, temperature=0.0, drafter=PromptLookup(3))) == drawn
    session.save(tmp_path / "session")
    other.load(tmp_path / "session")
    fork = session.fork()
    expected = list(session.generate(max_new_tokens=9, temperature=0.0))
    assert list(fork.generate(max_new_tokens=9, temperature=0.0)) == expected
    assert list(other.generate(max_new_tokens=9, temperature=0.0)) == expected
    assert list(session.generate(PROMPT, 30, temperature=0.0)) == drawn
    session.reset()
    assert list(session.generate(PROMPT[:9], 20, temperature=0.0)) == list(
        Session(model, **KIND).generate(PROMPT[:9], 20, temperature=0.0)
    )
    with pytest.raises(ValueError, match="use the same, or begin a new session"):
        Session(model, **KIND).load(tmp_path / "session")


def test_the_first_token_is_that_of_the_whole_prompt_and_the_rest_goes_on_from_what_is_kept():
    model = tiny_gpt()
    session, dense = Session(model, **KIND), Session(model)
    drawn = list(session.generate(PROMPT, 30, temperature=0.0))
    assert drawn[0] == next(dense.generate(PROMPT, 1, temperature=0.0))
    again = Session(model, **KIND)
    again.extend(PROMPT)
    assert again.cached == 39
    assert len(drawn) == 30
    assert session.kv_caches[0].current_length <= 16
    fork = session.fork()
    assert list(fork.generate(max_new_tokens=9, temperature=0.0)) == list(
        session.generate(max_new_tokens=9, temperature=0.0)
    )


def test_short_prompts_are_read_once_and_calls_by_hand_are_as_before():
    model = tiny_gpt()
    sizes = []
    model.set_start_of_layer_hook(lambda x, block_idx, input_pos: block_idx == 0 and sizes.append(x.shape[1]))
    list(Session(model, **KIND).generate(PROMPT[:16], 1, temperature=0.0))
    assert sum(sizes) == 16
    sizes.clear()
    list(Session(model, **KIND).generate(PROMPT, 1, temperature=0.0))
    assert sum(sizes) == 80
    sizes.clear()
    list(Session(model, budget="scores", **KIND).generate(PROMPT, 1, temperature=0.0))
    assert sum(sizes) == 78  # all but the first two again


@pytest.mark.parametrize("budget", ["uniform", "scores"])
def test_a_batch_with_kept_prefixes_reads_twice_what_no_prefix_begins(budget):
    model, sizes, answers = tiny_gpt(), [], []
    choose_kv_caches(
        model, CacheSpec("kvzip", budget=budget, **{name: x for name, x in KIND.items() if name != "kv_cache"}), 1
    )
    batch = ContinuousBatch(model, 1, prefixes=PrefixStore(10**6))
    model.set_start_of_layer_hook(lambda x, block_idx, _: sizes.append(x.shape[1]) if block_idx == 0 else None)
    prompt, expected = PROMPT, list(Session(model, budget=budget, **KIND).generate(PROMPT, 5, temperature=0.0))
    read = sum(sizes)
    for _ in range(2):
        sizes.clear()
        sequence = Sequence(torch.tensor(prompt), 5, Sampling(temperature=0))
        batch.submit(sequence)
        batch.run()
        answers.append((sequence.n_reused, sum(sizes), sequence.tokens[len(prompt) :]))
        prompt = [*PROMPT, *expected, 7, 8]
    assert answers[0] == (0, read, expected)
    assert answers[1][:2] == (44, 3 + 4)  # all but the last token of the answer was kept


def test_what_is_impossible_is_refused_in_one_line():
    model = tiny_gpt(**VOCABULARY)
    llm = LLM(model, Preprocessor(tiny_tokenizer()))
    kind = {"kv_cache": "kvzip", "cache_length": 16, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="reads a prompt of 30 tokens twice, which takes the model for itself"):
        llm.generate(["x" * 30, "y"], **kind)
    assert len(llm.generate(["x" * 30, "y"], batch_size=1, **kind)) == 2
    assert len(llm.generate(["x" * 9, "y"], **kind)) == 2
    with pytest.raises(ValueError, match="for one sequence at a time, not for 2: use batch_size=1"):
        llm.generate(["x" * 30, "y"], budget="scores", **kind)
    assert len(llm.generate(["x" * 30, "y"], batch_size=1, budget="scores", **kind)) == 2
    with pytest.raises(ValueError, match="of 120 tokens, it leaves only 8 of the model's context of 128"):
        llm.generate("x" * 120, **kind)


def test_a_failure_leaves_the_models_own_caches(monkeypatch):
    model = tiny_gpt()
    session = Session(model, **KIND)
    own = model.caches
    monkeypatch.setattr("litgpt.engine.second_reading._Watch.__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.extend([*PROMPT, 5])
    assert model.caches is own
    assert session.cached == 0
    monkeypatch.undo()
    fresh = Session(model, **KIND)
    fresh.extend([*PROMPT, 5])
    session.reset()
    session.extend([*PROMPT, 5])
    assert torch.equal(session.kv_caches[0].token_positions(), fresh.kv_caches[0].token_positions())
