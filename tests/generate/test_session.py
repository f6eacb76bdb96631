import pytest
import torch
from tiny import greedy_without_caches, tiny_gpt

from litgpt.generate.session import Session
from litgpt.kvcache.factory import create_kv_caches

GREEDY = {"temperature": 0.0}
FIRST = list(range(5, 15))


def expected(model, prompt, count):
    return greedy_without_caches(model, torch.tensor(prompt), count).tolist()


def counted(model):
    """Tokens that went through the model, call by call."""
    sizes = []
    model.set_start_of_layer_hook(lambda x, block_idx, input_pos: block_idx == 0 and sizes.append(x.shape[1]))
    return sizes


@pytest.mark.parametrize("window", [None, 8])
def test_only_what_is_new_is_computed_and_answers_are_those_of_a_fresh_run(window):
    flags = {} if window is None else {"sliding_window_size": window, "sliding_window_indices": [1, 0]}
    model = tiny_gpt(**flags)
    session, sizes = Session(model), counted(model)
    answer = list(session.generate(FIRST, 6, **GREEDY))
    assert answer == expected(model, FIRST, 6)
    for change in (0, 2, 4):  # tokens of the answer that the next prompt does not have
        prompt = FIRST + answer[: len(answer) - change] + [3, 1, 4]
        sizes.clear()
        again = list(session.generate(prompt, 4, **GREEDY))
        reused, calls = session.reused, list(sizes)
        assert again == expected(model, prompt, 4)
        assert calls[0] == len(prompt) - reused
        assert reused >= len(FIRST) + len(answer) - max(change, 1)


def test_what_cannot_be_rewound_is_computed_anew():
    model = tiny_gpt()
    model.assign_kv_caches(create_kv_caches("lastrec", model.config, 1, 8))
    session = Session(model)
    list(session.generate(FIRST, 6, **GREEDY))
    other = [*FIRST[:4], 77, 78]
    answer = list(session.generate(other, 3, **GREEDY))
    assert session.reused == 0
    assert answer == list(Session(model).generate(other, 3, **GREEDY))


def test_an_answer_may_be_left_at_any_time():
    model = tiny_gpt()
    session = Session(model)
    for stop_after in range(4):
        tokens = session.generate(FIRST, 6, **GREEDY)
        for _ in range(stop_after):
            next(tokens)
        tokens.close()
        prompt = [*FIRST, 3, 1]
        assert list(session.generate(prompt, 3, **GREEDY)) == expected(model, prompt, 3)


def test_an_interrupt_inside_the_model_leaves_nothing_wrong():
    model = tiny_gpt()
    session = Session(model)
    list(session.generate(FIRST, 6, **GREEDY))

    def interrupt(x, block_idx, input_pos):
        if block_idx == 1:
            raise KeyboardInterrupt

    model.set_start_of_layer_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(session.generate([*FIRST, 9], 3, **GREEDY))
    model.set_start_of_layer_hook(None)
    assert list(session.generate([*FIRST, 9], 3, **GREEDY)) == expected(model, [*FIRST, 9], 3)
    assert session.reused == 0


def test_caches_grow_with_the_sequence(monkeypatch):
    monkeypatch.setattr("litgpt.generate.engine.ROOM", 16)
    model = tiny_gpt()
    session = Session(model)
    prompt = list(FIRST)
    for _ in range(6):
        answer = list(session.generate(prompt, 8, **GREEDY))
        assert answer == expected(model, prompt, 8)
        prompt = prompt + answer + [2]
    assert model.get_kv_cache_params(0).cache_length == 64


def test_empty_and_too_long_prompts_are_refused():
    session = Session(tiny_gpt())
    with pytest.raises(ValueError, match="empty"):
        list(session.generate([], 3))
    with pytest.raises(ValueError, match="203 tokens.*context is 128"):
        list(session.generate([1] * 200, 3))
