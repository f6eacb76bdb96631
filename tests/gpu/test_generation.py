"""Answers on the device are those of the CPU, token by token."""

import copy

import pytest
import torch
from tiny import CHAT_TEMPLATE, LATENT, VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.chat.conversation import Conversation
from litgpt.engine.drafting import DraftModel
from litgpt.engine.loading import Ready
from litgpt.engine.session import Session
from litgpt.generate.base import batched_generate_fn
from litgpt.generate.speculative_decoding import generate as generate_speculatively
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.policies import POLICIES
from litgpt.prompts import ChatTemplate

pytestmark = pytest.mark.gpu

GREEDY = {"max_new_tokens": 24, "temperature": 0.0}
KINDS = {
    "plain": {},
    "windows": {"sliding_window_size": 8, "sliding_window_indices": [1, 0], "scale_embeddings": True, "norm_qk": True},
    "softcap": {"attention_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "sinks": {"attention_sinks": True},
    "experts": {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16},
    "latent": LATENT,
    "many groups": {"n_query_groups": 1},
}


def on_both(device, **kwargs):
    model = tiny_gpt(**kwargs)
    return model, copy.deepcopy(model).to(device)


def an_llm(model, device):
    llm = LLM(model.requires_grad_(True), Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE))
    llm.distribute(accelerator=device.type, precision="32-true")
    return llm


@pytest.fixture
def llms(device):
    models = on_both(device, **VOCABULARY, block_size=512)
    return [an_llm(model, where) for model, where in zip(models, (torch.device("cpu"), device), strict=True)]


def steps(model, prompts, length=60):
    prompts = [prompt.to(model.device) for prompt in prompts]
    options = {"sample_args": {"temperature": 0.0}, "include_prompt": False, "include_eos": True}
    with_none = batched_generate_fn(model, prompts, length, **options)
    return [[None if x is None else x.tolist() for x in step] for step in with_none]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_kind_of_layer(kind, device):
    model, other = on_both(device, **KINDS[kind])
    idx = torch.randint(0, 100, (2, 60))
    expected = model(idx)
    torch.testing.assert_close(other(idx.to(device)).cpu(), expected, atol=1e-3, rtol=1e-3)
    for gpt in (model, other):
        gpt.set_kv_caches(2)
    cuts = [other(part.to(device), start) for part, start in zip(idx.split((40, 1, 19), 1), (0, 40, 41), strict=True)]
    torch.testing.assert_close(torch.cat(cuts, 1).cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "policy", [name for name in POLICIES if name != "knorm"]
)  # equal tokens have equal norms there
def test_a_ragged_batch_with_every_policy(policy, device):
    prompts = [torch.randint(0, 100, (n,)) for n in (3, 50, 17)]
    found = []
    for model in on_both(device):
        spec = CacheSpec.parse(policy)
        # this one reads long prompts twice, alone
        length = 64 if policy == "kvzip" else 32 if spec.evicts else 128
        model.assign_kv_caches(CacheSpec.parse(policy, cache_length=length).create(model, 3))
        found.append(steps(model, prompts, 90))
    assert found[0] == found[1]


@pytest.mark.parametrize("budget", ["uniform", "scores"])
def test_a_prompt_that_is_read_twice(budget, device):
    prompt, found = torch.randint(0, 100, (50,)), []
    for model in on_both(device):
        model.assign_kv_caches(CacheSpec.parse("kvzip", cache_length=32, piece=16, budget=budget).create(model, 1))
        found.append(steps(model, [prompt], 80))
    assert found[0] == found[1]


@pytest.mark.parametrize("storage", ["int8", "int4", "k8v4", "fp8", "kivi", "offload"])
def test_logits_with_every_storage(storage, device):
    idx, found = torch.randint(0, 100, (2, 80)), []
    for model in on_both(device):
        args = {"window": 32} if storage == "kivi" else {}
        model.assign_kv_caches(CacheSpec.parse(f"dense-{storage}", cache_length=100, **args).create(model, 2))
        parts = zip(idx.to(model.device).split((60, 1, 1, 18), 1), (0, 60, 61, 62), strict=True)
        found.append(torch.cat([model(part, start) for part, start in parts], 1).cpu().flatten(0, 1))
    # numbers between two codes may round the other way
    assert torch.nn.functional.cosine_similarity(*found, dim=-1).min() > (1 - 1e-6 if storage == "offload" else 0.98)


def test_text_streams_batches_and_settings(llms):
    prompts = ["Hello", "A longer question, with more words?", "x"]
    for arguments in (
        {},
        {"kv_cache": "lastrec", "cache_length": 16, "n_sink": 2},
        {"prompt_chunksize": 7},
        {"batch_size": 2},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": {5: 2.0}},
        {"prompt_lookup": 3},
    ):
        texts = [llm.generate(prompts, **GREEDY, **arguments) for llm in llms]
        assert texts[0] == texts[1], arguments
    assert "".join(llms[1].generate("Hello", stream=True, **GREEDY)) == llms[0].generate("Hello", **GREEDY)


def test_random_tokens_follow_the_seed_on_any_device(llms):
    settings = {"max_new_tokens": 16, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 3}
    texts = [llm.generate(["Hello", "What?"], **settings) for llm in llms]
    assert texts[0] == texts[1]


def test_log_probabilities(llms):
    answers = [llm.generate("Hello", logprobs=2, **GREEDY) for llm in llms]
    assert answers[0].tokens == answers[1].tokens
    for one, other in zip(*(answer.logprobs for answer in answers), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draft_tokens_of_a_small_model(temperature, device):
    draft, target = tiny_gpt(n_layer=1).to(device), tiny_gpt().to(device)
    prompt = torch.randint(0, 100, (9,))
    tokens, _ = generate_speculatively(
        draft, target, prompt.to(device), 60, temperature=temperature, speculative_k=3, seed=5
    )
    assert len(tokens) == 60
    if not temperature:
        assert tokens[9:].tolist() == sum([step[0] for step in steps(target, [prompt])], [])


def test_a_batch_with_a_draft_model(device):
    model, draft = tiny_gpt().to(device), tiny_gpt(n_layer=1).to(device)
    session = Session(model)
    prompt = torch.randint(0, 100, (9,)).tolist()
    expected = list(Session(model).generate(prompt, 30, temperature=0.0))
    assert list(session.generate(prompt, 30, temperature=0.0, drafter=DraftModel(draft, 100, 3))) == expected


@pytest.mark.parametrize("kv_cache", ["dense", "dense-int8", "h2o", "lastrec"])
def test_sessions_go_on_from_files_on_either_device(kv_cache, device, tmp_path):
    models = on_both(device)
    length = 100 if kv_cache.startswith("dense") else 24
    sessions = [Session(model, kv_cache, cache_length=length) for model in models]
    prompt = torch.randint(0, 100, (30,)).tolist()
    answers = [list(session.generate(prompt, 8, temperature=0.0)) for session in sessions]
    if kv_cache != "dense-int8":
        assert answers[0] == answers[1]
    sessions[1].save(tmp_path / "session")
    tokens = [*sessions[1].tokens, 7, 8, 9]
    again, expected = Session(models[1], kv_cache, cache_length=length), None
    for session in (again, sessions[1]):
        if session is again:
            session.load(tmp_path / "session")
        found = list(session.generate(tokens, 8, temperature=0.0))
        assert expected is None or found == expected
        expected = found
    on_cpu = Session(models[0], kv_cache, cache_length=length)
    on_cpu.load(tmp_path / "session")
    if kv_cache != "dense-int8":
        assert list(on_cpu.generate(tokens, 8, temperature=0.0)) == expected


@pytest.mark.parametrize("kv_cache", ["snapkv", "expected", "h2o-int4"])
def test_a_compressed_text_answers_questions(kv_cache, llms, tmp_path):
    document = "The llama lives in the Andes. " * 12
    answers = []
    for llm in llms:
        small = llm.compress(document, kv_cache, 64)
        small.save(tmp_path / "small")
        opened = llm.session(kv_cache, 64)
        opened.load(tmp_path / "small")
        answers.append([llm.ask(one, "Where?", 8, temperature=0.0) for one in (small, opened)])
        assert answers[-1][0] == answers[-1][1]
    if kv_cache != "h2o-int4":
        assert answers[0] == answers[1]


def test_a_conversation(llms, tmp_path):
    said = []
    for llm in llms:
        ready = Ready(llm.model, llm.tokenizer, llm.prompt_style, tmp_path)
        talk = Conversation(ready, lambda ready=ready: Session(ready.model), 12, {"temperature": 0.0})
        said.append(["".join(talk.ask(text)) for text in ("Hello", "And then?")])
    assert said[0] == said[1]
