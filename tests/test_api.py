import copy
import inspect
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import CHAT_TEMPLATE, VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor, benchmark_dict_to_markdown_table, calculate_number_of_devices
from litgpt.kvcache import CacheSpec
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
    assert llm.model.get_kv_cache_params(0).cache_length > 20  # the default ones, which the model got back
    assert llm.generate("Hello", **args).equal(dense)
    assert llm.generate(["Hello"] * 3, **args)[2].equal(dense)


def test_misspelt_arguments_are_not_taken_for_those_of_a_cache(llm):
    with pytest.raises(ValueError, match="no argument 'max_new_token': did you mean max_new_tokens"):
        llm.generate("Hello", max_new_token=5)
    with pytest.raises(ValueError, match="'dense' has no argument 'n_sink'"):
        llm.generate("Hello", n_sink=5)
    with pytest.raises(ValueError, match="no key-value cache is called ''"):
        llm.generate("Hello", kv_cache="")
    with pytest.raises(TypeError, match=r"LLM.load\(\) takes a folder"):
        LLM("a/folder")


def test_system_prompt_is_rendered(llm):
    assert llm.tokenizer.decode(llm._text_to_token_ids("Hi", "Be kind.")) == "Be kind.Hi"


def test_save_and_load_give_the_same_model(llm, tmp_path):
    args = {"max_new_tokens": 12, "temperature": 0.0}
    answer = llm.generate("Hello", **args)
    llm.save(tmp_path / "saved")
    again = LLM.load(tmp_path / "saved", precision="32-true")
    assert again.generate("Hello", **args) == answer
    assert again.prompt_style.apply("Hi") == llm.prompt_style.apply("Hi")


def test_an_accelerator_that_is_none_is_refused(llm):
    with pytest.raises(ValueError, match="Invalid accelerator 'tpux'"):
        llm.distribute(accelerator="tpux")


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
    assert "\n| Inference speed in tokens/sec       |" in benchmark_dict_to_markdown_table(results)
    with pytest.raises(ValueError, match="num_iterations .*0"):
        llm.benchmark(num_iterations=0, prompt="Hello")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": "x" * 200}, r"253 tokens, but the model's context is 128"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"kv_cache": "nonsense"}, "nonsense.*dense.*lastrec"),
        ({"cache_length": 0}, "cache_length.*0"),
        ({"cache_length": 10}, "cache_length=10"),
        ({"n_sink": 2}, "n_sink"),
        ({"prompt": ["a", "b"], "stream": True}, "single prompt"),
    ],
)
def test_what_cannot_work_is_refused(llm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(**{"prompt": "Hello", **kwargs})


def test_without_distribute_it_generates_as_it_was_loaded(llm, tmp_path):
    args = {"max_new_tokens": 8, "temperature": 0}
    llm.save(tmp_path)
    assert LLM.load(tmp_path, distribute=None).generate("Hello", **args) == llm.generate("Hello", **args)
    with pytest.raises(ValueError, match="out_dir"):
        llm.save()


# -- caches


@pytest.mark.parametrize("kind", ["dense", "lastrec"])
def test_assigned_caches_are_used_and_stay_assigned(llm, kind):
    args = {"max_new_tokens": 20, "temperature": 0.0, "return_as_token_ids": True}
    named = llm.generate("Hello", kv_cache=kind, cache_length=100 if kind == "dense" else 9, **args)
    llm.model.clear_kv_caches(assigned=True)
    caches = some_caches(llm.model, kind, 100 if kind == "dense" else 9)
    llm.model.assign_kv_caches(caches)
    for generate in (llm.generate, lambda *x, **y: torch.cat(list(llm.generate(*x, stream=True, **y)))):
        assert generate("Hello", **args).equal(named)
        assert llm.model.kv_caches() == caches
        assert caches[0].next_token_pos >= len(llm._text_to_token_ids("Hello")) + len(named) - 1
        for cache in caches:
            cache.clear()
    other = llm.generate("Hello", kv_cache="dense", **args)
    assert other.equal(llm.generate("Hello", kv_cache="dense", cache_length=60, **args))
    session = llm.session()
    list(session.generate([1, 2, 3], 5))
    assert llm.model.kv_caches() == caches
    assert not any(cache.next_token_pos for cache in caches)
    with pytest.raises(ValueError, match="2 sequences at once.*batch_size=1"):
        llm.generate(["a", "b"])


def some_caches(model, kind, length):
    """Caches that a user makes."""
    return CacheSpec(kind, cache_length=length).create(model, 1)


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.2, "seed": 3, "kv_cache": "lastrec", "cache_length": 12},
    {"temperature": 0.0, "prompt_lookup": 4},
    {"temperature": 0.9, "seed": 5, "kv_cache": "dense", "cache_length": 90},
]


def test_streams_that_are_read_in_turn_give_the_texts_of_streams_read_alone(llm):
    prompts = ["Hello", "A longer question?", "abcabcabc", "x"]
    calls = list(zip(prompts, SETTINGS, strict=True))
    alone = [llm.generate(prompt, max_new_tokens=15, **args) for prompt, args in calls]
    streams = [llm.generate(prompt, max_new_tokens=15, stream=True, **args) for prompt, args in calls]
    left = llm.generate("never read to its end", max_new_tokens=15, stream=True)
    next(left)
    texts, running = [""] * 4, set(range(4))
    session = llm.session()
    tokens = llm._text_to_token_ids("Hello").tolist()
    said = session.generate(tokens, 15, temperature=0)
    expected_session = llm.generate("Hello", max_new_tokens=15, temperature=0, return_as_token_ids=True).tolist()
    from_session = []
    while running:
        from_session += [token for _, token in zip(range(1), said, strict=False)]
        assert llm.generate(prompts[1], max_new_tokens=15, **SETTINGS[1]) == alone[1]  # another call between
        for i in list(running):
            piece = next(streams[i], None)
            if piece is None:
                running.remove(i)
            else:
                texts[i] += piece
    assert texts == alone
    assert from_session[: len(expected_session)] == expected_session[: len(from_session)]
    left.close()
    assert len(llm.model.kv_caches()) == 2  # one set of default caches, whoever brought them back


def test_threads_get_their_own_texts(llm):
    calls = [(prompt, args) for prompt in ("Hello", "What?", "abcabc") for args in SETTINGS]
    alone = [llm.generate(prompt, max_new_tokens=12, **args) for prompt, args in calls]

    def run(i):
        prompt, args = calls[i]
        if i % 2:
            return "".join(llm.generate(prompt, max_new_tokens=12, stream=True, **args))
        return llm.generate(prompt, max_new_tokens=12, **args)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, range(len(calls)))) == alone


def test_of_two_streams_on_assigned_caches_the_earlier_one_says_that_it_was_overtaken(llm):
    llm.model.assign_kv_caches(some_caches(llm.model, "dense", 100))
    first = llm.generate("Hello", max_new_tokens=9, temperature=0, stream=True, return_as_token_ids=True)
    next(first)
    second = llm.generate("What?", max_new_tokens=9, temperature=0, stream=True, return_as_token_ids=True)
    assert torch.cat(list(second)).tolist() == expected(llm, "What?", 9)
    with pytest.raises(ValueError, match="others have used the model's key-value caches"):
        list(first)
    assert llm.generate("Hello", max_new_tokens=9, temperature=0, return_as_token_ids=True).tolist() == expected(
        llm, "Hello", 9
    )


# -- interrupts


def interrupted(run, after):
    """Run with a KeyboardInterrupt at that line of the package (counted from the call); whether it came."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if "litgpt" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        # Python looks for signals at calls and loops only: none can come where a lock is let go
        if event == "line" and frame.f_code.co_name != "_locked":
            lines += 1
            if lines == after:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("how", ["at once", "stream", "lastrec", "assigned", "batch", "session"])
def test_an_interrupt_at_any_line_leaves_everything_usable(llm, how):
    args = {"max_new_tokens": 5, "temperature": 0, "return_as_token_ids": True}
    if how == "assigned":
        llm.model.assign_kv_caches(some_caches(llm.model, "dense", 100))
    own = llm.model.kv_caches()
    answer = expected(llm, "Hello", 5)
    prompt = llm._text_to_token_ids("Hello").tolist()
    sessions = {"kept": llm.session()}
    runs = {
        "at once": lambda: llm.generate("What?", **args),
        "stream": lambda: list(llm.generate("What?", stream=True, **args)),
        "lastrec": lambda: llm.generate("What?", kv_cache="lastrec", cache_length=9, **args),
        "assigned": lambda: llm.generate("What?", **args),
        "batch": lambda: llm.generate(["What?", "Why?", "a", "a"], batch_size=2, prompt_lookup=3, **args),
        "session": lambda: list(sessions["kept"].generate(prompt, 5, temperature=0)),
    }
    chance, at, came = random.Random(how), 1, True
    while came:
        if how != "session" and at % 2:
            llm.model.clear_kv_caches()  # default ones are made anew
        came = interrupted(runs[how], at)
        if how == "session":
            assert list(sessions["kept"].generate(prompt, 5, temperature=0))[: len(answer)] == answer
        assert llm.generate("Hello", **args).tolist() == answer
        if how == "assigned":
            assert llm.model.kv_caches() == own
        at += chance.randrange(1, 200)
    assert at > 300


# -- what cannot be drawn from, or run


@pytest.mark.parametrize("dtype", ["32-true", "bf16-true"])
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("nan")])
def test_weights_that_are_not_finite_are_an_error_however_tokens_are_drawn(llm, broken, temperature, dtype):
    with torch.no_grad():
        llm.model.transformer.ln_f.weight[3] = broken
    llm.distribute("cpu", precision=dtype)
    for more in ({}, {"top_k": 5}, {"top_p": 0.5}, {"prompt_lookup": 4}, {"logprobs": 1}, {"min_p": 0.1}):
        for prompt in ("abcabcabc", ["abcabc", "x"]):
            with pytest.raises(ValueError, match=r"logits are NaN or infinite"):
                llm.generate(prompt, max_new_tokens=3, temperature=temperature, **more)


def test_a_tiny_temperature_takes_the_likeliest_token(llm):
    greedy = llm.generate("Hello", max_new_tokens=12, temperature=0)
    for temperature in (1e-38, 1e-46, 5e-324, 1e-10):
        for more in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
            assert llm.generate("Hello", max_new_tokens=12, temperature=temperature, **more) == greedy


def test_tokens_that_the_model_does_not_have_are_named():
    model = tiny_gpt(vocab_size=100, padded_vocab_size=100)
    llm = LLM(model, Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE))
    with pytest.raises(ValueError, match=r"token \d+, but the model knows 0\.\.99: is the tokenizer"):
        llm.generate("zzz\u00ff")
    with pytest.raises(ValueError, match="token 100"):
        list(llm.session().generate([1, 100], 3))


# -- prompts and settings of other types


def test_messages_are_a_prompt_and_lists_of_them_several(llm):
    args = {"max_new_tokens": 7, "temperature": 0}
    one = [{"role": "user", "content": "Hello"}]
    more = [*one, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "What?"}]
    assert llm.generate(one, **args) == llm.generate("Hello", **args)
    assert llm.generate(tuple(one), **args) == llm.generate("Hello", **args)
    assert "".join(llm.generate(more, stream=True, **args)) == llm.generate(more, **args)
    assert llm.generate([one, more, "Hello"], **args) == [llm.generate(x, **args) for x in (one, more, "Hello")]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": 3}, "a prompt is a text or a list of messages.*got 3"),
        ({"prompt": None}, "a prompt is a text"),
        ({"prompt": ["a", 3]}, "a prompt is a text.*got 3"),
        ({"prompt": {"role": "user", "content": "a"}}, "a prompt is a text"),
        ({"prompt": [{"role": "user"}]}, "a message has"),
        ({"prompt": [{"role": "user", "content": "a"}, "b"]}, "a prompt is a text"),
        ({"temperature": "0.8"}, "temperature must be a number, got '0.8'"),
        ({"temperature": None}, "temperature must be a number"),
        ({"top_k": 5.5}, r"top_k must be a whole number.*5\.5"),
        ({"top_k": "5"}, "top_k must be a whole number"),
        ({"top_p": True}, "top_p must be a number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"logit_bias": [1]}, "logit_bias must be a mapping"),
        ({"logits_processors": [3]}, "logits processor"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": "2"}, "batch_size must be a whole number"),
        ({"cache_length": "9"}, "cache_length must be a whole number"),
        ({"prompt_chunksize": 0}, "prompt_chunksize must be at least 1"),
        ({"sys_prompt": 3}, "sys_prompt must be a text"),
        ({"temperature": 10**400}, "temperature is too large"),
    ],
)
def test_what_has_the_wrong_type_is_refused_in_one_line(llm, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        llm.generate(**{"prompt": "Hello", **kwargs})
    assert "\n" not in str(error.value)


def test_whole_numbers_may_be_floats(llm):
    args = {"temperature": 0.9, "seed": 3}
    same = llm.generate("Hello", max_new_tokens=9, top_k=50, **args)
    assert llm.generate("Hello", max_new_tokens=9.0, top_k=50.0, **args) == same


# -- as LitGPT


@pytest.mark.parametrize("prefix", ["llm.", "llm.model.", "model.", "model._forward_module.", ""])
def test_the_weights_of_a_trainers_checkpoint_are_found_under_any_prefix(llm, tmp_path, prefix):
    weights = {prefix + name: x.clone() + 1 for name, x in llm.model.state_dict().items()}
    torch.save({"state_dict": {**weights, "loss.weight": torch.ones(2)}, "epoch": 3}, tmp_path / "last.ckpt")
    llm.trainer_setup(tmp_path / "last.ckpt")
    for name, x in llm.state_dict().items():
        assert torch.equal(x, weights[prefix + name])


def test_arguments_and_helpers_stand_where_litgpt_has_them(llm):
    names = ["self", "model", "preprocessor", "prompt_style", "devices", "config", "checkpoint_dir", "fabric"]
    names += ["generate_strategy", "kv_cache_initialized", "fixed_kv_cache_size"]
    assert list(inspect.signature(LLM.__init__).parameters) == names
    again = LLM(llm.model, llm.preprocessor, llm.prompt_style, 1, llm.config)
    assert (again.devices, again.config) == (1, llm.config)
    assert [calculate_number_of_devices(x) for x in (3, [0, 1], None)] == [3, 2, 0]
    lines = benchmark_dict_to_markdown_table({"Seconds total": [1.0, 2.0]}).splitlines()
    assert lines == [
        "| Metric                              | Mean                        | Std Dev                     |",
        "|-------------------------------------|-----------------------------|-----------------------------|",
        "| Seconds total                       | 1.50                        | 0.71                        |",
    ]


def test_a_text_that_spells_a_conversation_is_not_taken_for_it(llm):
    messages = [{"role": "user", "content": "Hello"}]
    settings = {"max_new_tokens": 6, "temperature": 0, "return_as_token_ids": True}
    together = llm.generate([str(messages), messages], **settings)
    for prompt, answer in zip((str(messages), messages), together, strict=True):
        assert answer.tolist() == llm.generate(prompt, **settings).tolist()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_model_that_has_answered_can_be_copied(llm, precision):
    llm.distribute(accelerator="cpu", precision=precision)
    answer = llm.generate("Hello", max_new_tokens=6, temperature=0)
    for other in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm)), llm):
        assert other.generate("Hello", max_new_tokens=6, temperature=0) == answer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "a\ud800"}, "half of a surrogate pair at character"),
        ({"prompt": [{"role": "user", "content": "\udc80"}]}, "UTF-8"),
        ({"stream": torch.ones(2)}, "stream is True or False"),
        ({"kv_cache": 5}, "CacheSpec or the name of one, got 5"),
        ({"kv_cache": ["dense"]}, "CacheSpec or the name of one"),
        ({"kv_cache": "lastrec", "n_sink": "2"}, "n_sink"),
        ({"logits_processors": None}, "logits processors"),
        ({"logits_processors": [lambda tokens, logits: None]}, "must return logits"),
        ({"logits_processors": [lambda tokens, logits: logits[:9]]}, r"gave \(9,\)"),
        ({"logits_processors": [lambda tokens, logits: logits[None]]}, "must return logits"),
        ({"logit_bias": {5: 10**400}}, "logit_bias"),
        ({"logit_bias": {5: -(10**400)}}, "logit_bias"),
        ({"logit_bias": {True: 1.0}}, "logit_bias"),
    ],
)
def test_what_a_call_cannot_use_is_one_line(llm, wrong, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(**{"prompt": "Hello", "max_new_tokens": 3, **wrong})


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_embeddings_are_tied_as_in_the_checkpoint_unless_they_are_asked_to_be_apart(tmp_path, tie_embeddings):
    gpt = tiny_gpt(**VOCABULARY)
    gpt.lm_head.weight = gpt.transformer.wte.weight
    LLM(gpt, Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE)).save(tmp_path / "m")
    llm = LLM.load(tmp_path / "m", tie_embeddings=tie_embeddings)
    model = llm.prepare_for_training()
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie_embeddings
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


DOCUMENT = "The llama lives in the Andes and eats grass. " * 4


@pytest.mark.parametrize("kind", ["snapkv", "h2o", "knorm-int8", "lastrec"])
def test_compressed_text_is_a_small_cache_that_many_questions_use_and_that_survives_a_file(llm, kind, tmp_path):
    llm.model.max_seq_length = 128
    text, size = DOCUMENT[:90], {"cache_length": 32}
    small = llm.compress(text, kind, **size)
    before, held = small.tokens, [cache.token_positions() for cache in small.kv_caches]
    assert small.cache_bytes < CacheSpec(cache_length=len(before)).size(llm.model, 1)[0] / 8
    asked = {"max_new_tokens": 6, "temperature": 0.0}
    answers = [llm.ask(small, question, **asked) for question in ("Where?", "What?")]
    assert small.tokens == before
    assert all(torch.equal(a, cache.token_positions()) for a, cache in zip(held, small.kv_caches, strict=True))
    for question, answer in zip(("Where?", "What?"), answers, strict=True):
        frame = llm._frame()
        whole = llm.session(kind, **size)
        whole.extend(before)
        drawn = whole.generate([*before, *frame.ask(question)], 6, stop_tokens=[[0]], temperature=0.0)
        assert answer == llm.tokenizer.decode(list(drawn))
        assert frame.begin(text) + frame.ask(question) == tuple(
            llm._text_to_token_ids(f"{text}\n\n{question}").tolist()
        )
    small.save(tmp_path / "small")
    later = llm.session(kind, **size)
    later.load(tmp_path / "small")
    assert [llm.ask(later, question, **asked) for question in ("Where?", "What?")] == answers
    for a, b in zip(small.kv_caches, later.kv_caches, strict=True):
        states = a.state(), b.state()
        assert states[0].keys() == states[1].keys()
        assert all(
            torch.equal(x, states[1][k]) if isinstance(x, torch.Tensor) else x == states[1][k]
            for k, x in states[0].items()
        )
    assert "".join(llm.ask(small, "Where?", stream=True, **asked)) == answers[0]


def test_a_session_is_compressed_to_another_and_stays(llm):
    whole = llm.session()
    whole.extend(llm._frame().begin(DOCUMENT[:90]))
    small = llm.compress(whole, CacheSpec("snapkv", cache_length=32))
    assert small.tokens == whole.tokens
    assert whole.cached == small.cached == len(whole.tokens) - 1
    same = llm.compress(DOCUMENT[:90], "snapkv", 32)
    asked = {"max_new_tokens": 6, "temperature": 0.0}
    assert llm.ask(small, "Where?", **asked) == llm.ask(same, "Where?", **asked)


def test_what_cannot_be_compressed_or_asked_is_said(llm):
    for nothing in ("", llm.session()):
        with pytest.raises(ValueError, match="there is nothing to compress"):
            llm.compress(nothing, "snapkv", 32)
    with pytest.raises(ValueError, match="compress takes a text or a session, got 5"):
        llm.compress(5, "snapkv", 32)
    with pytest.raises(ValueError, match="the question is empty"):
        llm.ask(llm.compress("Andes", "snapkv", 32), "")
