"""The engine: shared prefill, log-probabilities, cancelled sequences."""

import pytest
import torch
from tiny import VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.engine.answer import Answer
from litgpt.engine.caches import prepare_caches
from litgpt.engine.engine import Engine, decode
from litgpt.engine.prefill import prefill
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence

GREEDY = Sampling(temperature=0)
PROMPT = torch.arange(5, 25)


def finish(engine, sequences=None):
    for _ in decode(engine, sequences) if sequences else iter(engine.step, []):
        pass


def counted(model):
    """(rows, tokens) of every call."""
    sizes = []
    model.set_start_of_layer_hook(lambda x, block_idx, input_pos: block_idx == 0 and sizes.append(tuple(x.shape[:2])))
    return sizes


@pytest.mark.parametrize(
    ("lengths", "chunksize", "expected"),
    [
        ((3, 9, 3, 7), None, [(1, 22)]),  # what is short, together
        ((3, 9, 3, 7), 10, [(2, 3), (1, 7), (1, 9)]),  # of as many tokens as a call may have
        ((12, 5, 12), 5, [(1, 5), (2, 5), (2, 5), (2, 2)]),  # what is too long for a call, those alike together
        ((1100, 1100, 30), None, [(1, 30), (2, 1100)]),
    ],
)
def test_prompts_go_through_the_model_in_few_calls(lengths, chunksize, expected):
    model = tiny_gpt(block_size=2000, n_layer=1)
    model.set_kv_caches(len(lengths), max_seq_length=1200)
    sizes = counted(model)
    logits = prefill(model, [torch.randint(0, 90, (length,)) for length in lengths], chunksize)
    assert len(logits) == len(lengths)
    assert sizes == expected


def test_samples_of_one_prompt_share_its_prefill_also_when_they_join_others():
    model = tiny_gpt()
    prepare_caches(model, 6, 64)
    engine, sizes = Engine(model), counted(model)
    other = torch.tensor([7, 7, 7])
    first = [Sequence(other, 20, GREEDY)]
    samples = [Sequence(PROMPT, 12, Sampling(temperature=2.0, seed=seed)) for seed in (1, 2, 1)]
    more = [Sequence(prompt, 12, GREEDY) for prompt in (other, PROMPT)]
    engine.add(first)
    engine.add([samples[0], more[0], samples[1], samples[2], more[1]])
    assert sizes == [(1, 3), (1, 23)]  # the prompt that is shared and the other one, in one call
    finish(engine)
    model.set_start_of_layer_hook(None)
    assert more[1].output == greedy_without_caches(model, PROMPT, 12).tolist()
    assert first[0].output[:12] == more[0].output == greedy_without_caches(model, other, 12).tolist()
    assert samples[0].output == samples[2].output != samples[1].output
    alone = Sequence(PROMPT, 12, Sampling(temperature=2.0, seed=2))
    finish(Engine(model), [alone])
    assert samples[1].output == alone.output


@pytest.mark.parametrize("chunksize", [None, 4])
def test_log_probabilities_are_the_models_own(chunksize):
    model = tiny_gpt(**VOCABULARY)
    prepare_caches(model, 2, 64)
    sampling = Sampling(temperature=3.0, top_k=50, repetition_penalty=2.0, logit_bias={9: 3.0}, seed=5)
    sequences = [Sequence(PROMPT, 10, sampling, logprobs=3), Sequence(PROMPT[:4], 15, GREEDY, logprobs=0)]
    finish(Engine(model, chunksize), sequences)
    for sequence in sequences:
        whole = torch.cat((sequence.prompt, torch.tensor(sequence.new_tokens)))
        expected = model(whole[None])[0, len(sequence.prompt) - 1 : -1].log_softmax(-1)
        drawn = expected.gather(1, torch.tensor(sequence.new_tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.token_logprobs), drawn, atol=1e-4, rtol=0)
        for row, top in zip(expected, sequence.top_logprobs, strict=True):
            values, tokens = row.topk(sequence.logprobs)
            assert list(top) == tokens.tolist()
            torch.testing.assert_close(torch.tensor(list(top.values())), values, atol=1e-4, rtol=0)
    answer = Answer.of(sequences[0], tiny_tokenizer())
    assert [one.id for one in answer.logprobs] == answer.tokens == sequences[0].new_tokens
    record = answer.record()
    assert (record["new_tokens"], record["prompt_tokens"], record["finish_reason"]) == (10, 20, "length")
    assert [len(entry["top"]) for entry in record["logprobs"]] == [3] * 10


def test_log_probabilities_end_with_the_output():
    model, free = tiny_gpt(), Sequence(PROMPT, 20, GREEDY)
    prepare_caches(model, 1, 64)
    finish(Engine(model), [free])
    place = next(i for i in range(4, 20) if free.new_tokens[i] not in free.new_tokens[:i])
    stopped = Sequence(PROMPT, 20, GREEDY, [free.new_tokens[place - 1 : place + 1]], logprobs=1)
    finish(Engine(model), [stopped])
    assert (stopped.finish_reason, stopped.output) == ("stop", free.new_tokens[: place - 1])
    answer = Answer.of(stopped, tiny_tokenizer())
    assert (answer.finish_reason, len(answer.logprobs)) == ("stop", place - 1)


def test_a_cancelled_request_gives_nothing_more_and_makes_room():
    model = tiny_gpt()
    prepare_caches(model, 2, 40)
    engine = Engine(model)
    sequences = [Sequence(PROMPT[:n], 15, GREEDY) for n in (3, 8, 5)]
    engine.add(sequences[:2])
    engine.cancel(sequences[0])  # before its first token was given out
    assert [sequence for sequence, _ in engine.step()] == sequences[1:2]
    engine.add(sequences[2:])
    finish(engine)
    assert (sequences[0].finish_reason, sequences[0].output[1:]) == ("cancelled", [])
    for sequence in sequences[1:]:
        assert sequence.output == greedy_without_caches(model, sequence.prompt, 15).tolist()
    engine.cancel(sequences[1])
    assert sequences[1].finish_reason == "length"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": torch.empty(0, dtype=torch.int64)}, "at least one token"),
        ({"prompt": torch.ones(1, 3, dtype=torch.int64)}, r"\(1, 3\)"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"logprobs": -1}, "logprobs.*-1"),
    ],
)
def test_impossible_requests_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sequence(**{"prompt": PROMPT, "max_new_tokens": 3, **kwargs})
