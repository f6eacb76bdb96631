"""Caches that are made elsewhere, with the methods of LitGPT's pull request 2061 and no others."""

import re
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.engine.prefill import prefill
from litgpt.engine.session import Session
from litgpt.generate.base import batched_generate_fn, generate
from litgpt.keys_and_values import DefaultKeysAndValues
from litgpt.kvcache import DefaultKVCache, KVCache
from litgpt.kvcache.layers import LayerCaches
from litgpt.prompts import Default

PROMPT = torch.arange(3, 33)


class Elsewhere(KVCache):
    """Keeps the last tokens in lists; a prompt may have no more than there are slots."""

    def __init__(self, config, batch_size, cache_length, block_idx):
        super().__init__(config, batch_size, cache_length, block_idx)
        self.keys = self.values = self.position = None

    def forward(self, query, key, value, token_idx, input_pos):
        if input_pos == 0:
            if key.shape[2] > self.max_prefill_length:
                raise ValueError("too long")
            self.keys, self.values, self.position = key, value, 0
        else:
            self.keys, self.values = torch.cat((self.keys, key), 2), torch.cat((self.values, value), 2)
        T, N = key.shape[2], self.keys.shape[2]
        mask = torch.ones(T, N, dtype=torch.bool, device=key.device).tril(N - T)
        y = torch.nn.functional.scaled_dot_product_attention(
            query, self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        self.position += T
        self.keys, self.values = self.keys[:, :, -self.cache_length :], self.values[:, :, -self.cache_length :]
        return y.transpose(1, 2).flatten(2)

    @property
    def next_token_pos(self):
        return self.position

    @property
    def max_tokens_forward(self):
        return 4

    @property
    def max_prefill_length(self):
        return self.cache_length

    def get_keys_values(self):
        return None if self.keys is None else DefaultKeysAndValues(self.keys, self.values)

    def token_positions(self):
        N = self.keys.shape[2]
        return torch.arange(self.position - N, self.position).expand(self.keys.shape[0], self.n_query_groups, N)

    def size_estimate(self):
        return self.size_estimate_apriori(self.get_params())

    @classmethod
    def size_estimate_apriori(cls, params):
        bits = 64 * params.batch_size * params.n_query_groups * params.cache_length * params.head_size
        return bits, {"all": bits}

    @property
    def device(self):
        return torch.device("cpu")


class Prefilled(DefaultKVCache):
    """A dense cache by `_prefill` and `_forward`, which notes the weights that it is given."""

    def __init__(self, config, batch_size, cache_length, block_idx):
        super().__init__(config, batch_size, cache_length, block_idx)
        self.k = self.v = None
        self.weights = []

    eff_batch_size = property(lambda self: None if self.k is None else self.k.shape[0])
    next_token_pos = property(lambda self: 0 if self.k is None else self.k.shape[2])
    max_tokens_forward = property(lambda self: self.cache_length)
    max_prefill_length = property(lambda self: self.cache_length)
    evicts = property(lambda self: False)
    device = property(lambda self: torch.device("cpu"))

    def _prefill(self, key, value, token_idx):
        self.k, self.v = key, value

    def _forward(self, key, value, token_idx):
        self.k, self.v = torch.cat((self.k, key), 2), torch.cat((self.v, value), 2)
        return DefaultKeysAndValues(self.k, self.v)

    def update_requires_attn_weights(self):
        return True

    def _update(self, attn_weights):
        self.weights.append(attn_weights)

    def get_keys_values(self):
        return DefaultKeysAndValues(self.k, self.v)

    def token_positions(self):
        return torch.arange(self.next_token_pos).expand(self.eff_batch_size, self.n_query_groups, -1)

    def size_estimate(self):
        return 0, {}

    @classmethod
    def size_estimate_apriori(cls, params):
        return 0, {}


def model_with(kind, batch_size, cache_length):
    model = tiny_gpt()
    model.assign_kv_caches(kind(model.config, batch_size, cache_length, i) for i in range(model.config.n_layer))
    return model


@pytest.mark.parametrize("kind", [Elsewhere, Prefilled])
def test_it_generates_for_one_row_again_and_again(kind):
    model = model_with(kind, 2, 80)
    for start in (0, 5):
        prompt = PROMPT[start:]
        found = generate(model, prompt, len(prompt) + 20, temperature=0)
        assert found[len(prompt) :].tolist() == greedy_without_caches(tiny_like(model), prompt, 20).tolist()


@pytest.mark.parametrize("kind", [Elsewhere, Prefilled])
def test_llm_generates_and_streams_with_it(kind):
    llm = LLM(tiny_gpt(**VOCABULARY), Preprocessor(tiny_tokenizer()), Default())
    expected = llm.generate("Hello", max_new_tokens=20, temperature=0)
    llm.model.clear_kv_caches()
    llm.model.assign_kv_caches(kind(llm.model.config, 1, 80, i) for i in range(llm.model.config.n_layer))
    assert llm.generate("Hello", max_new_tokens=20, temperature=0) == expected
    assert "".join(llm.generate("Hello", max_new_tokens=20, temperature=0, stream=True)) == expected
    assert isinstance(llm.model.kv_caches()[0], kind)


def tiny_like(model):
    other = tiny_gpt()
    other.load_state_dict(model.state_dict())
    return other


def test_a_prompt_longer_than_it_takes_enters_in_chunks_and_it_counts_as_evicting():
    model = model_with(Elsewhere, 1, 12)
    assert all(cache.evicts for cache in model.kv_caches())
    found = generate(model, PROMPT, 70, temperature=0)
    assert len(found) == 70
    assert model.kv_caches()[0].keys.shape[2] == 12
    again = generate(model, PROMPT, 70, temperature=0, prompt_chunksize=12)
    assert again.tolist() == found.tolist()


def test_a_cache_that_says_it_does_not_evict_is_held_to_its_length():
    with pytest.raises(ValueError, match="40 tokens.*cache_length=35"):
        generate(model_with(Prefilled, 1, 35), PROMPT, 40)


def test_weights_come_summed_over_the_queries_and_not_for_the_prefill():
    model = model_with(Prefilled, 1, 40)
    with torch.no_grad():
        model(PROMPT[None, :10], 0)
        model(PROMPT[None, 10:13], 10)
    (weights,) = model.kv_caches()[0].weights
    assert (weights.shape, weights.dtype) == ((1, 4, 13), torch.float32)
    torch.testing.assert_close(weights.sum(-1), torch.full((1, 4), 3.0))


def test_rows_of_one_length_go_together_and_others_are_refused_in_one_line():
    model = model_with(Elsewhere, 2, 40)
    batch = torch.stack((PROMPT, PROMPT.flip(0)))
    expected = tiny_like(model)(batch)
    with torch.no_grad():
        found = torch.cat((model(batch[:, :20], 0), *(model(batch[:, i : i + 1], i) for i in range(20, 30))), 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"^Elsewhere takes all rows together.*another cache$"):
        prefill(model, [PROMPT[:4], PROMPT])
    with pytest.raises(ValueError, match="reorder"):
        model.caches.reorder([1, 0])
    with pytest.raises(ValueError, match="extend"):
        model.caches.extend(1)


def test_a_batch_is_refused_before_the_prefill():
    model = model_with(Elsewhere, 2, 40)
    steps = batched_generate_fn(
        model,
        torch.stack((PROMPT, PROMPT.flip(0))),
        35,
        sample_args={"temperature": 0},
        include_prompt=False,
        include_eos=False,
    )
    with pytest.raises(ValueError, match="2 sequences at once, but Elsewhere cannot drop or reorder rows"):
        next(steps)
    assert model.next_token_pos == 0


def test_what_it_cannot_do_says_so_and_the_rest_works(tmp_path):
    model = model_with(Elsewhere, 1, 40)
    with torch.no_grad():
        model(PROMPT[None], 0)
        cache = model.kv_caches()[0]
        assert (cache.row_lengths, cache.crop_limit, cache.max_rewindable_tokens) == ((30,), 30, 0)
        copy, empty = cache.fork(), cache.empty_copy()
        assert torch.equal(copy.keys, cache.keys)
        assert copy.keys is not cache.keys
        assert (empty.row_lengths, type(empty)) == ((), Elsewhere)
        for refused in (cache.state, lambda: cache.load_state({}), lambda: cache.crop(7), lambda: cache.rewind([3])):
            with pytest.raises(ValueError, match=r"^Elsewhere cannot "):
                refused()
        assert not model.caches.crop(7)
        assert model.next_token_pos == 0
        model(PROMPT[None, :9], 0)
        assert model.next_token_pos == 9
        with pytest.raises(ValueError, match="input_pos=4.* 9"):
            model(PROMPT[None, :1], 4)


def test_a_session_runs_with_it_and_cannot_be_saved(tmp_path):
    model = tiny_gpt()
    session = Session(model)
    session._lease._caches = LayerCaches.assigned(
        [Elsewhere(model.config, 1, 80, i) for i in range(model.config.n_layer)], model.config
    )
    session._grows = False
    answer = list(session.generate(PROMPT.tolist(), 8, temperature=0))
    assert answer == greedy_without_caches(model, PROMPT, 8).tolist()
    with pytest.raises(ValueError, match="Elsewhere cannot give its state"):
        session.save(tmp_path / "s")


class Foreign(torch.nn.Module):
    """A cache with the methods of keys_values: it keeps the last tokens, counts them itself, and a call that brings more
    than fill it up, or replace all of it but one when it is full, is an error."""

    def __init__(self, config, batch_size, cache_length, block_idx):
        super().__init__()
        self.inner = Elsewhere(config, batch_size, cache_length, block_idx)
        self.max_batch_size, self.cache_length, self.block_idx = batch_size, cache_length, block_idx
        self.head_size, self.dtype, self.device = config.head_size, None, None
        self.reset()

    def reset(self):
        self.input_pos = 0

    @property
    def max_prefill_length(self):
        return self.cache_length - 2

    def max_forward_length(self):
        assert self.input_pos
        free = self.cache_length - self.input_pos
        return free if free > 0 else self.cache_length - 1

    def forward(self, query, key, value, token_idx):
        limit = self.max_forward_length() if self.input_pos else self.max_prefill_length
        assert key.shape[2] <= limit
        y = self.inner(query, key, value, token_idx, self.input_pos)
        self.input_pos += key.shape[2]
        return y


@pytest.mark.parametrize("cache_length", [80, 11])
def test_the_tutorials_adapter_takes_caches_of_another_contract(cache_length):
    text = (Path(__file__).parents[2] / "tutorials" / "cache_policies.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n([^`]*class Adapted\(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(code, names := {})
    model = tiny_gpt()
    model.assign_kv_caches(
        names["Adapted"](model.config, Foreign(model.config, 1, cache_length, i)) for i in range(model.config.n_layer)
    )
    found = [generate(model, PROMPT, 60, temperature=0) for _ in range(2)]
    assert found[0].tolist() == found[1].tolist()
    if cache_length > 60:
        assert found[0][len(PROMPT) :].tolist() == greedy_without_caches(tiny_like(model), PROMPT, 30).tolist()


def test_what_is_no_cache_is_refused():
    model = tiny_gpt()
    with pytest.raises(ValueError, match="layer 0 is a Linear, which is no KVCache"):
        model.assign_kv_caches([torch.nn.Linear(1, 1)] * 2)
