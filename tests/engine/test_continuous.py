"""Requests that wait, join, leave and are cancelled: each gets what it gets alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import StaticShapes, create_kv_caches, greedy_without_caches, tiny_gpt

from litgpt.engine.caches import prepare_caches
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.drafting import Draft
from litgpt.engine.engine import Engine, decode
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence

pytestmark = pytest.mark.usefixtures("small_pieces")
ROWS = 3
WINDOWS = {"sliding_window_size": 6, "sliding_window_indices": [1, 0]}
SETTINGS = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5),
    Sampling(temperature=1.5, top_k=20, seed=3),
    Sampling(temperature=1.5, top_p=0.9, min_p=0.01, presence_penalty=1.0, seed=4),
    Sampling(temperature=1.0, logit_bias={5: 4.0, 7: -100.0}, seed=5),
]
MODELS = {
    "dense": tiny_gpt(),
    "windows": tiny_gpt(**WINDOWS),
    "lastrec": tiny_gpt(),
    "static": tiny_gpt(),
    "static lastrec": tiny_gpt(),
    "h2o": tiny_gpt(),
    "static snapkv": tiny_gpt(),
}
for name, gpt in MODELS.items():
    gpt.layer_runner = StaticShapes() if name.startswith("static") else None
    if name.endswith("lastrec"):
        gpt.assign_kv_caches(create_kv_caches("lastrec", gpt.config, ROWS, 12, n_sink=2))
    if name.endswith(("h2o", "snapkv")):
        gpt.assign_kv_caches(create_kv_caches(name.split()[-1], gpt.config, ROWS, 12, tail=3))


@pytest.fixture(scope="module")
def small_pieces():
    """Prompts enter by 8 tokens where no chunk size is given, so that short ones enter in pieces, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litgpt.engine.prefill.CHUNK_TOKENS", 8)
        yield


def sequence(length, count, kind, stop):
    prompt = torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(length))
    stops = [[stop, stop + 1], [stop + 2]] if stop is not None else ()
    return Sequence(prompt, count, SETTINGS[kind], stops, include_eos=bool(length % 2))


def alone(model, *args, chunksize=None):
    wanted = sequence(*args)
    prepare_caches(model, ROWS, 64)  # the same caches, so that nothing but the company differs
    for _ in decode(Engine(model, chunksize), [wanted]):
        pass
    return wanted


def pointers(batch):
    own = batch.engine.lease.caches
    return [x.data_ptr() for cache in (own.caches if own else batch.model.kv_caches()) for x in cache.buffers()]


arguments = st.tuples(
    st.integers(1, 30), st.integers(1, 20), st.integers(0, len(SETTINGS) - 1), st.none() | st.integers(0, 97)
)
actions = st.sampled_from(["submit", "submit", "share", "step", "steps", "cancel"])
events = st.lists(st.tuples(actions, arguments), max_size=12)


@pytest.mark.parametrize("name", MODELS)
@given(events, st.integers(0, 99), st.sampled_from([None, 1, 7]))
@settings(max_examples=15)
def test_every_request_gets_its_own_answer_whatever_joins_and_leaves(name, events, chance, chunksize):
    model = MODELS[name]
    batch = ContinuousBatch(model, ROWS, 64, chunksize)
    buffers = pointers(batch)
    sequences, given_out = [], {}

    def step():
        for done, tokens in batch.step():
            assert done.finish_reason != "cancelled" or done not in cancelled
            given_out[done] += tokens

    cancelled = set()
    for action, args in events:
        if action == "submit" or (action == "share" and sequences):
            if action == "share":  # one prompt, which goes through the model once, if they join together
                args = (len(sequences[-1][0].prompt), *args[1:])
            sequences.append((sequence(*args), args))
            if action == "share":
                sequences[-1][0].prompt = sequences[-2][0].prompt
            given_out[sequences[-1][0]] = []
            batch.submit(sequences[-1][0])
        elif action == "cancel" and sequences:
            chosen, _ = sequences[chance % len(sequences)]
            if chosen.finish_reason is None:
                batch.cancel(chosen)
                cancelled.add(chosen)
        else:
            for _ in range(1 if action == "step" else 4):
                step()
    while batch.unfinished:
        step()
    step()
    assert batch.step() == []
    assert buffers == pointers(batch)
    batch.close()
    for one, args in sequences:
        other = alone(model, *args, chunksize=chunksize)
        assert given_out[one] == one.output
        if one in cancelled:
            assert one.finish_reason == "cancelled"
            assert one.new_tokens == other.new_tokens[: len(one.new_tokens)]
        else:
            assert (one.new_tokens, one.output, one.finish_reason) == (
                other.new_tokens,
                other.output,
                other.finish_reason,
            )


@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_as_many_rows_as_it_must(name):
    model, sizes = MODELS[name], []
    batch = ContinuousBatch(model, ROWS, 64)
    for length, count in ((3, 10), (4, 4), (5, 6), (6, 12)):
        batch.submit(sequence(length, count, 0, None))
    hook = lambda x, block_idx, input_pos: block_idx or x.shape[1] > 1 or sizes.append(x.shape[0])  # noqa: E731
    model.set_start_of_layer_hook(hook)
    while batch.unfinished:
        batch.step()
    model.set_start_of_layer_hook(None)
    # the fourth takes the place of the second at once; then the third leaves, and the first
    assert sizes == ([3] * 14 if model.static_shapes else [3] * 5 + [2] * 4 + [1] * 5)


@pytest.mark.parametrize("name", MODELS)
def test_a_long_prompt_does_not_hold_up_the_others(name):
    model, calls = MODELS[name], []
    batch = ContinuousBatch(model, ROWS, 64, prompt_chunksize=8)
    first, others = sequence(3, 20, 0, None), [sequence(29, 3, 0, None) for _ in range(2)]
    others[1].prompt = others[0].prompt
    batch.submit(first)
    batch.step()
    for other in others:
        batch.submit(other)
    model.set_start_of_layer_hook(lambda x, block_idx, _: block_idx or calls.append(tuple(x.shape[:2])))
    counts = []
    while not others[0].n_new:
        counts.append([len(tokens) for _, tokens in batch.step()])
    model.set_start_of_layer_hook(None)
    assert counts == [[1]] * 3 + [[2, 2, 1]]
    assert calls == [(1, 8), (1, 1), (1, 8), (1, 1), (1, 8), (1, 1), (1, 5), (3, 1)]
    batch.cancel(others[0])
    while batch.unfinished:
        batch.step()
    for one, args in ((first, (3, 20, 0, None)), (others[1], (29, 3, 0, None))):
        assert one.output == alone(model, *args, chunksize=8).output


@pytest.mark.parametrize("name", MODELS)
def test_draft_tokens_are_accepted_beside_prompts_that_are_prefilled(name):
    class Bold:
        def draft(self, rows, limits):
            return [Draft([row.tokens[-1], 3, 5][:limit]) for row, limit in zip(rows, limits, strict=True)]

    model = MODELS[name]
    batch = ContinuousBatch(model, ROWS, 64, 8, Bold())
    prompts = [torch.arange(length) % 4 for length in (9, 5, 27)]
    sequences = [Sequence(prompt, 20, Sampling(temperature=0)) for prompt in prompts]
    for one in sequences:
        batch.submit(one)
        batch.step()
        batch.step()
    while batch.unfinished:
        batch.step()
    assert batch.engine.n_drafted > 0 or name.endswith("lastrec")  # what was evicted cannot be taken back
    for one, prompt in zip(sequences, prompts, strict=True):
        prepare_caches(model, ROWS, 64)
        wanted = Sequence(prompt, 20, Sampling(temperature=0))
        for _ in decode(Engine(model, 8), [wanted]):
            pass
        assert one.output == wanted.output


@pytest.mark.parametrize("cancelled", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_prompts_that_enter_may_be_cancelled(cancelled):
    model = MODELS["dense"]
    batch = ContinuousBatch(model, 5, 64, prompt_chunksize=8)
    first, same = sequence(3, 20, 0, None), [sequence(20, 6, 0, None) for _ in range(3)]
    for other in same:
        other.prompt = same[0].prompt
    batch.submit(first)
    batch.step()
    for other in same:
        batch.submit(other)
    batch.step()
    for i in cancelled:
        batch.cancel(same[i])
    last = sequence(6, 6, 0, None)
    batch.submit(last)  # takes a place that is free now, before the others have gone on
    steps = 0
    while batch.unfinished:
        batch.step()
        steps += 1
    assert steps < 30
    expected = alone(model, 20, 6, 0, None).output
    assert [one.output for one in same] == [[] if i in cancelled else expected for i in range(3)]
    assert last.output == alone(model, 6, 6, 0, None).output
    assert first.output == alone(model, 3, 20, 0, None).output


def test_idle_rows_stay_empty_however_long_the_others_go_on():
    model = tiny_gpt()
    model.layer_runner = StaticShapes()
    batch = ContinuousBatch(model, ROWS, 20)
    for _ in range(6):
        batch.submit(sequence(5, 15, 0, None))
        while batch.unfinished:
            batch.step()
            lengths = batch.engine.lease.caches.caches[0].row_lengths
            assert len(lengths) == ROWS
            assert sum(length > 0 for length in lengths) == 1


def test_what_will_never_fit_is_refused_and_disturbs_nobody():
    model = tiny_gpt()
    batch = ContinuousBatch(model, 2, 40)
    first = sequence(5, 10, 0, None)
    batch.submit(first)
    batch.step()
    for bad, message in (
        (sequence(30, 11, 0, None), "41 tokens.*40"),
        (Sequence(first.prompt, 3, Sampling(logit_bias={100: 1.0})), "token 100.*100"),
        (Sequence(first.prompt, 3, logprobs=101), "logprobs=101"),
        (first, "only once"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.submit(bad)
    with pytest.raises(ValueError, match="3 sequences at once.*batch_size=2"):
        batch.engine.add([sequence(4, 4, 0, None), sequence(5, 4, 0, None)])
    while batch.unfinished:
        batch.step()
    assert first.output == greedy_without_caches(model, first.prompt, 10).tolist()
    with pytest.raises(ValueError, match="batch_size"):
        ContinuousBatch(model, 0)
    with pytest.raises(ValueError, match="200 tokens.*128"):
        ContinuousBatch(tiny_gpt(), 2, 200)


def test_a_failure_leaves_an_empty_batch_that_works():
    model = tiny_gpt()
    batch = ContinuousBatch(model, 2, 40)
    lost, later = sequence(5, 10, 0, None), sequence(6, 10, 0, None)
    batch.submit(lost)
    batch.step()
    batch.submit(entering := sequence(20, 10, 0, None))
    batch.step()
    assert not entering.n_new

    def interrupt(x, block_idx, input_pos):
        raise KeyboardInterrupt

    model.set_start_of_layer_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    model.set_start_of_layer_hook(None)
    assert batch.unfinished == 0
    assert lost.finish_reason is None
    batch.submit(later)
    while batch.unfinished:
        batch.step()
    assert later.output == greedy_without_caches(model, later.prompt, 10).tolist()


def test_with_long_rope_long_and_short_sequences_take_turns():
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    model = tiny_gpt(rope_adjustments={"original_max_seq_len": 16, "factor": 8.0, **factors})
    sizes = [(4, 6), (10, 20), (5, 8), (12, 15)]
    expected = []
    for length, count in sizes:
        one = sequence(length, count, 0, None)
        prepare_caches(model, 1, one.max_length)
        for _ in decode(Engine(model), [one]):
            pass
        expected.append(one.output)
    batch = ContinuousBatch(model, ROWS, 64)
    sequences = [sequence(length, count, 0, None) for length, count in sizes]
    for one in sequences:
        batch.submit(one)
    while batch.unfinished:
        batch.step()
    assert [one.output for one in sequences] == expected
    together = [sequence(*sizes[i], 0, None) for i in (0, 2)]  # two short ones begin a batch, after a long one
    for one in together:
        batch.submit(one)
    while batch.unfinished:
        batch.step()
    assert [one.output for one in together] == [expected[0], expected[2]]
    batch.submit(sequence(4, 6, 0, None))
    batch.step()
    with pytest.raises(ValueError, match="LongRoPE"):
        batch.engine.add([sequence(10, 20, 0, None)])
