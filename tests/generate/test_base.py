import io

import pytest
import torch
from tiny import CHAT_TEMPLATE, StaticShapes, create_kv_caches, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.chat_template import ChatTemplate
from litgpt.engine.loading import Ready
from litgpt.generate import base
from litgpt.generate.base import (
    batched_generate_fn,
    batched_next_token,
    generate,
    generate_fn,
    next_token,
)

GREEDY = {"temperature": 0.0}


def collect(steps, rows):
    pieces = [[] for _ in range(rows)]
    for step in steps:
        assert len(step) == rows
        for row, tokens in zip(pieces, step, strict=True):
            if tokens is not None:
                row.append(tokens)
    return [torch.cat(row) if row else torch.empty(0, dtype=torch.int64) for row in pieces]


def run(model, prompts, length, **kwargs):
    kwargs = {"sample_args": GREEDY, "include_prompt": False, "include_eos": True, **kwargs}
    return collect(batched_generate_fn(model, prompts, length, **kwargs), len(prompts))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 100, (n,), generator=generator) for n in (5, 17, 1, 9, 5)]


@pytest.mark.parametrize("chunksize", [None, 1, 4, 100])
def test_a_ragged_batch_equals_greedy_decoding_without_caches(prompts, chunksize):
    model = tiny_gpt()
    rows = run(model, prompts, 40, prompt_chunksize=chunksize)
    for prompt, row in zip(prompts, rows, strict=True):
        assert torch.equal(row, greedy_without_caches(model, prompt, 40 - len(prompt)))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kv_cache", ["dense", "lastrec"])
def test_every_row_equals_its_own_run_with_stops_and_settings_of_its_own(prompts, kv_cache, static):
    model = tiny_gpt(block_size=64)
    model.layer_runner = StaticShapes() if static else None
    model.assign_kv_caches(create_kv_caches(kv_cache, model.config, 5, 64 if kv_cache == "dense" else 8))
    args = [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.0}, {"top_p": 0.0}, {"temperature": 0.0}]
    free = run(model, prompts, 60, sample_args=args)
    stops = [free[0][7:9].tolist(), free[1][20:21].tolist(), free[3][:1].tolist()]
    together = run(model, prompts, 60, sample_args=args, stop_tokens=stops)
    alone = [run(model, [p], 60, sample_args=a, stop_tokens=stops)[0] for p, a in zip(prompts, args, strict=True)]
    assert len({len(row) for row in together}) > 2  # rows end at different times
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_equal_prompts_are_run_once(prompts):
    model, calls = tiny_gpt(), []
    model.set_start_of_layer_hook(lambda x, block_idx, input_pos: calls.append(tuple(x.shape[:2])))
    rows = run(model, [prompts[1]] * 3, 25)
    assert calls[0] == (1, 17)
    assert calls[-1] == (3, 1)
    assert all(torch.equal(row, greedy_without_caches(model, prompts[1], 8)) for row in rows)


def test_finished_rows_leave_the_computation(prompts):
    model, sizes = tiny_gpt(), []
    model.set_start_of_layer_hook(lambda x, block_idx, input_pos: sizes.append(x.shape[0]))
    run(model, [prompts[1], prompts[2]], 20, include_eos=True)
    assert sizes[-1] == 1


def test_prompt_and_end_are_included_as_asked(prompts):
    model, prompt = tiny_gpt(), prompts[0]
    free = greedy_without_caches(model, prompt, 20)
    stop = next(i for i in range(3, 20) if free[i] not in free[:i])
    for include_prompt in (True, False):
        for include_eos in (True, False):
            tokens = torch.cat(
                list(
                    generate_fn(
                        model,
                        prompt,
                        40,
                        temperature=0.0,
                        stop_tokens=([int(free[stop])],),
                        include_prompt=include_prompt,
                        include_eos=include_eos,
                    )
                )
            )
            expected = free[: stop + include_eos]
            assert torch.equal(tokens, torch.cat((prompt, expected)) if include_prompt else expected)
    whole = generate(model, prompt, 40, temperature=0.0, eos_id=int(free[stop]))
    assert torch.equal(whole, torch.cat((prompt, free[: stop + 1])))


def test_a_second_run_never_differs_from_the_first(prompts):
    model = tiny_gpt()
    first = generate(model, prompts[0], 30, temperature=0.0)
    generate(model, prompts[1], 50, temperature=1.0)
    assert torch.equal(generate(model, prompts[0], 30, temperature=0.0), first)


def test_next_token_functions(prompts):
    model = tiny_gpt()
    model.set_kv_caches(2)
    x = torch.stack((prompts[0], prompts[4]))
    first = batched_next_token(model, 0, x, GREEDY)
    second = batched_next_token(model, 5, first, [GREEDY, GREEDY])
    assert first.shape == second.shape == (2, 1)
    expected = torch.stack([greedy_without_caches(model, p, 2) for p in x])
    assert torch.equal(torch.cat((first, second), 1), expected)
    assert torch.equal(next_token(model, 0, x[:1], **GREEDY), expected[0, :1])


def test_an_evicting_cache_goes_on_beyond_the_context(prompts):
    model = tiny_gpt(block_size=32)
    model.assign_kv_caches(create_kv_caches("lastrec", model.config, 1, 16))
    assert len(generate(model, prompts[0], 100, temperature=0.0)) == 100


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 129}, "129 tokens, but the model's context is 128"),
        ({"length": 17}, "no room after a prompt of 17"),
        ({"sample_args": {"top_p": 2.0}}, "top_p"),
        ({"sample_args": [GREEDY]}, "1 sets"),
        ({"prompt_chunksize": 0}, "prompt_chunksize"),
        ({"prompts": [torch.empty(0, dtype=torch.int64)]}, "at least one token"),
        ({"prompts": []}, "at least one token"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(prompts, kwargs, message):
    model = tiny_gpt()
    model.set_start_of_layer_hook(lambda *_: pytest.fail("work was done"))
    kwargs = {"prompts": prompts, "length": 40, **kwargs}
    with pytest.raises(ValueError, match=message):
        run(model, **kwargs)


def test_caches_that_are_too_small_are_refused_before_any_work(prompts):
    model = tiny_gpt()
    model.assign_kv_caches(create_kv_caches("dense", model.config, 2, 20))
    model.set_start_of_layer_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="5 sequences.*batch_size=2"):
        run(model, prompts, 20)
    with pytest.raises(ValueError, match="30 tokens.*cache_length=20"):
        run(model, prompts[:2], 30)


def test_default_caches_grow_and_inference_leaves_training_possible(prompts):
    model = tiny_gpt()
    generate(model, prompts[0], 20, temperature=0.0)
    assert model.get_kv_cache_params(0).cache_length == 20
    generate(model, prompts[0], 30, temperature=0.0)
    assert model.get_kv_cache_params(0).cache_length == 30
    model.requires_grad_(True)
    model(prompts[1][None]).sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_a_prompt_longer_than_the_context_enters_an_evicting_cache_in_chunks():
    model = tiny_gpt(block_size=32)
    model.assign_kv_caches(create_kv_caches("lastrec", model.config, 1, 16))
    prompt = torch.randint(0, 100, (90,))
    assert len(generate(model, prompt, 95, temperature=0.0)) == 95
    with pytest.raises(ValueError, match="prefill of 90 tokens.*32"):
        model(prompt, 0)


@pytest.mark.parametrize(("max_new_tokens", "moves"), [(8, False), (base.LONG_ANSWER, True)])
def test_only_long_answers_move_weights_to_huge_pages_and_the_first_words_do_not_wait(
    monkeypatch, max_new_tokens, moves
):
    calls, written = [], io.StringIO()
    monkeypatch.setattr(base, "use_huge_pages", lambda model: calls.append(written.getvalue()))
    monkeypatch.setattr("sys.stdout", written)
    tokenizer = tiny_tokenizer()
    model = tiny_gpt(block_size=256, padded_vocab_size=tokenizer.n_tokens)
    ready = Ready(model, tokenizer, ChatTemplate(CHAT_TEMPLATE), None)
    always_a = {tokenizer.encode("a").tolist()[-1]: 1000.0}
    options = base.GenerateOptions(prompt="a", max_new_tokens=max_new_tokens, logit_bias=always_a)
    base.print_answers(ready, base.prompt_lines(options)[0], options)
    assert len(calls) == moves
    assert all(0 < len(before) < len(written.getvalue()) for before in calls)
