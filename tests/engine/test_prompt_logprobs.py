"""Log-probabilities of the tokens of prompts."""

import pytest
import torch
from tiny import tiny_gpt

from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.engine import Engine
from litgpt.engine.loading import choose_kv_caches
from litgpt.engine.prefixes import PrefixStore
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.kvcache import CacheSpec

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("chunksize", [7, None])
def test_they_are_those_of_one_pass_whatever_else_is_in_the_batch(chunksize, kept):
    torch.manual_seed(0)
    model = tiny_gpt()
    prompts = [torch.randint(100, (n,)) for n in (20, 1, 9, 31)]
    batch = ContinuousBatch(model, 3, 64, chunksize, prefixes=PrefixStore(kept) if kept else None)
    asked = [Sequence(prompts[i], 4, GREEDY, logprobs=2, logprobs_of_prompt=i != 2) for i in (0, 2, 0, 1, 3, 0)]
    for sequence in asked:
        batch.submit(sequence)
    batch.run()
    for sequence in asked:
        logprobs = model(sequence.prompt[None])[0].log_softmax(-1)
        assert sequence.new_tokens[0] == logprobs[-1].argmax()
        if not sequence.logprobs_of_prompt:
            assert sequence.prompt_logprobs == sequence.prompt_top_logprobs == []
            continue
        expected = logprobs[:-1].gather(1, sequence.prompt[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.prompt_logprobs), expected, atol=1e-5, rtol=1e-5)
        top = [list(one) for one in sequence.prompt_top_logprobs]
        assert top == logprobs[:-1].topk(2).indices.tolist()


def test_what_cannot_be_noted_is_refused():
    with pytest.raises(ValueError, match="needs logprobs"):
        Sequence(torch.tensor([1]), 1, logprobs_of_prompt=True)
    model, sequence = tiny_gpt(), Sequence(torch.arange(40), 1, logprobs=0, logprobs_of_prompt=True)
    choose_kv_caches(model, CacheSpec(cache_length=64), 1)
    with pytest.raises(ValueError, match="chunk by chunk"):
        Engine(model).add([sequence])
    choose_kv_caches(model, CacheSpec("kvzip", cache_length=20), 1)
    with pytest.raises(ValueError, match="read twice"):
        ContinuousBatch(model, 1).submit(sequence)
