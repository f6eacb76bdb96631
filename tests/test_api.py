import pytest
import torch
from tiny import CHAT_TEMPLATE, VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor, benchmark_dict_to_markdown_table
from litgpt.prompts import ChatTemplate
from litgpt.runners.packed_weights import PackedLinear


@pytest.fixture
def llm():
    model = tiny_gpt(**VOCABULARY).requires_grad_(True)
    llm = LLM(model, Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE))
    llm.distribute(accelerator="cpu", precision="32-true")
    return llm


def expected(llm, prompt, count):
    with torch.no_grad():
        tokens = greedy_without_caches(llm.model, llm._text_to_token_ids(prompt).long(), count).tolist()
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


def test_generate_answers_with_text_tokens_or_a_stream(llm):
    args = {"max_new_tokens": 12, "temperature": 0.0}
    tokens = llm.generate("Hello", return_as_token_ids=True, **args)
    assert tokens.tolist() == expected(llm, "Hello", 12)
    text = llm.generate("Hello", **args)
    assert text == llm.tokenizer.decode(tokens)
    assert "".join(llm.generate("Hello", stream=True, **args)) == text
    assert torch.cat(list(llm.generate("Hello", stream=True, return_as_token_ids=True, **args))).equal(tokens)


def test_a_list_of_prompts_is_answered_each_as_alone(llm):
    prompts = ["Hello", "A longer question?", "x"]
    together = llm.generate(prompts, max_new_tokens=9, temperature=0.0, return_as_token_ids=True)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert tokens.tolist() == expected(llm, prompt, 9)
    assert llm.generate(prompts, max_new_tokens=9, temperature=0.0) == [llm.tokenizer.decode(t) for t in together]


def test_batches_in_turns_seeds_and_settings_give_each_prompt_its_own_answer(llm):
    texts = ["Hello there", "a", "Hello there", "What is this?"]
    settings = {
        "max_new_tokens": 12,
        "temperature": 1.2,
        "top_k": 60,
        "min_p": 0.01,
        "frequency_penalty": 0.5,
        "seed": 7,
    }
    together = llm.generate(texts, **settings)
    assert llm.generate(texts, batch_size=2, **settings) == together
    assert together[0] != together[2]  # each has a seed of its own
    for i, text in enumerate(texts):
        assert llm.generate(text, **{**settings, "seed": 7 + i}) == together[i]


def test_answers_come_with_their_log_probabilities(llm):
    answers = llm.generate(["Hello", "What?"], max_new_tokens=5, temperature=0, logprobs=2)
    for answer in answers:
        assert len(answer.logprobs) == len(answer.tokens)
        assert all(one.id == one.top[0].id and one.logprob == one.top[0].logprob for one in answer.logprobs)
    assert [answer.text for answer in answers] == llm.generate(["Hello", "What?"], max_new_tokens=5, temperature=0)
    banned = {one.id: -100.0 for one in answers[0].logprobs}
    other = llm.generate("Hello", max_new_tokens=5, temperature=0, logit_bias=banned, return_as_token_ids=True)
    assert not set(other.tolist()) & set(banned)
    with pytest.raises(ValueError, match="logprobs"):
        llm.generate("Hello", logprobs=1, stream=True)


def test_logits_processors_see_every_answer_as_its_own(llm):
    class Count:
        """Spells a, b, c, ..."""

        place = 0

        def __call__(self, tokens, logits):
            token = llm.tokenizer.encode("abcdefgh"[self.place]).item()
            self.place += 1
            return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([token]), 0.0)

    texts = llm.generate(["Hello", "you"], max_new_tokens=4, logits_processors=[Count()])
    assert texts == ["abcd", "abcd"]


def test_cache_policy_and_length_are_arguments_and_leave_no_trace(llm):
    args = {"max_new_tokens": 20, "temperature": 0.0, "return_as_token_ids": True}
    dense = llm.generate("Hello", **args)
    long_enough = llm.generate("Hello", kv_cache="lastrec", cache_length=64, **args)
    assert long_enough.equal(dense)
    assert not llm.generate("Hello", kv_cache="lastrec", cache_length=8, **args).equal(dense)
    assert llm.model.get_kv_cache_params(0).cache_length == 8
    assert llm.generate("Hello", **args).equal(dense)
    assert llm.generate(["Hello"] * 3, **args)[2].equal(dense)


def test_system_prompt_is_rendered(llm):
    assert llm.tokenizer.decode(llm._text_to_token_ids("Hi", "Be kind.")) == "Be kind.Hi"


def test_save_and_load_give_the_same_model(llm, tmp_path):
    args = {"max_new_tokens": 12, "temperature": 0.0}
    answer = llm.generate("Hello", **args)
    llm.save(tmp_path / "saved")
    again = LLM.load(tmp_path / "saved", precision="32-true")
    assert again.generate("Hello", **args) == answer
    assert again.prompt_style.apply("Hi") == llm.prompt_style.apply("Hi")


def test_training_after_generating_trains_the_same_parameters(llm):
    llm.distribute(accelerator="cpu", precision="bf16-true")
    optimizer = torch.optim.SGD(llm.parameters(), lr=0.1)
    llm.generate("Hello", max_new_tokens=3)
    before = {name: x.clone() for name, x in llm.state_dict().items()}
    logits, loss = llm(torch.randint(0, 261, (2, 8)), target_ids=torch.randint(0, 261, (2, 8)))
    assert logits.shape == (2, 8, 261)
    loss.backward()
    optimizer.step()
    assert not any(isinstance(m, PackedLinear) for m in llm.modules())
    changed = [name for name, x in llm.state_dict().items() if not torch.equal(x, before[name])]
    assert set(changed) >= {"transformer.h.0.attn.qkv.weight", "lm_head.weight", "transformer.wte.weight"}
    llm.generate("Hello", max_new_tokens=3)


def test_loss_is_that_of_the_next_token(llm):
    ids = torch.randint(0, 261, (1, 6))
    logits, loss = llm(ids, target_ids=ids)
    logprobs = logits.log_softmax(-1)
    picked = torch.stack([logprobs[0, t, ids[0, t + 1]] for t in range(5)])
    torch.testing.assert_close(loss, -picked.mean())


def test_random_weights_by_name():
    llm = LLM.load("pythia-14m", init="random")
    assert llm.model(torch.tensor([[1, 2]])).shape == (1, 2, llm.config.padded_vocab_size)
    with pytest.raises(ValueError, match="tokenizer_dir"):
        llm.generate("Hello")


def test_benchmark_measures_and_is_a_table(llm):
    text, results = llm.benchmark(num_iterations=2, prompt="Hello", max_new_tokens=5, temperature=0.0)
    assert text == llm.generate("Hello", max_new_tokens=5, temperature=0.0)
    assert len(results["Seconds total"]) == 2
    for first, total in zip(results["Seconds to first token"], results["Seconds total"], strict=True):
        assert 0 < first <= total
    assert "| Inference speed in tokens/sec |" in benchmark_dict_to_markdown_table(results)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": "x" * 200}, r"253 tokens, but the model's context is 128"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"kv_cache": "nonsense"}, "nonsense.*dense-default"),
        ({"cache_length": 0}, "cache_length.*0"),
        ({"cache_length": 10}, "cache_length=10"),
        ({"n_sink": 2}, "n_sink"),
        ({"prompt": ["a", "b"], "stream": True}, "single prompt"),
    ],
)
def test_what_cannot_work_is_refused(llm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(**{"prompt": "Hello", **kwargs})


def test_an_unplaced_model_says_what_to_do(llm):
    llm.placed = False
    with pytest.raises(ValueError, match=r"distribute\(\)"):
        llm.generate("Hello")
