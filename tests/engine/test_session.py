"""Sessions: whatever is reused, restored or copied, the tokens are those of a run from the beginning."""

import importlib
import random
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import LATENT, greedy_without_caches, tiny_gpt
from torch._dynamo.utils import counters

from litgpt.config import Config
from litgpt.engine import Session
from litgpt.engine.session_file import read_session, write_session
from litgpt.fingerprint import fingerprint
from litgpt.kvcache import CacheSpec, DefaultKVCache
from litgpt.model import GPT
from litgpt.runners.compiled import compile_decode
from litgpt.runners.packed_weights import can_pack, pack_linears

GREEDY = {"temperature": 0.0}
FIRST = list(range(5, 15))
WINDOW = {"sliding_window_size": 8, "sliding_window_indices": [1, 0]}
# what a session may be: flags of the model, and its own arguments
KINDS = {
    "dense": ({}, {}),
    "dense of a fixed length": ({}, {"cache_length": 100}),
    "lastrec": ({}, {"kv_cache": "lastrec", "cache_length": 24}),
    "lastrec with sinks": ({}, {"kv_cache": "lastrec", "cache_length": 24, "n_sink": 3}),
    "snapkv": ({}, {"kv_cache": "snapkv", "cache_length": 24, "tail": 6}),
    "h2o": (WINDOW, {"kv_cache": "h2o", "cache_length": 24, "tail": 6}),
    "sliding windows": (WINDOW, {}),
    "latent attention": (LATENT, {}),
    "latent attention and h2o": (LATENT, {"kv_cache": "h2o", "cache_length": 24}),
}
every_kind = pytest.mark.parametrize(("flags", "kind"), KINDS.values(), ids=KINDS)


def expected(model, prompt, count):
    return greedy_without_caches(model, torch.tensor(prompt), count).tolist()


def counted(model):
    """Tokens that went through the model, call by call."""
    sizes = []
    model.set_start_of_layer_hook(lambda x, block_idx, input_pos: block_idx == 0 and sizes.append(x.shape[1]))
    return sizes


def some_tokens(count, seed=0):
    return random.Random(seed).choices(range(100), k=count)


# -- reuse


@pytest.mark.parametrize("window", [None, 8])
def test_only_what_is_new_is_computed_and_answers_are_those_of_a_fresh_run(window):
    model = tiny_gpt(**({} if window is None else WINDOW))
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
    kind = {"kv_cache": "lastrec", "cache_length": 8}
    session = Session(model, **kind)
    list(session.generate(FIRST, 6, **GREEDY))
    other = [*FIRST[:4], 77, 78]
    answer = list(session.generate(other, 3, **GREEDY))
    assert session.reused == 0
    assert answer == list(Session(model, **kind).generate(other, 3, **GREEDY))


@every_kind
def test_extended_piece_by_piece_it_is_what_it_would_be_at_once(flags, kind):
    model = tiny_gpt(**flags)
    session, sizes = Session(model, **kind), counted(model)
    pieces = [some_tokens(n, n) for n in (1, 1, 9, 1, 4)]
    for piece in pieces:
        session.extend(piece)
    prompt = sum(pieces, [])
    assert sum(sizes) == session.cached == len(prompt) - 1
    answer = list(session.generate(max_new_tokens=5, **GREEDY))
    assert answer == list(Session(model, **kind).generate(prompt, 5, **GREEDY)) == expected(model, prompt, 5)
    assert session.tokens == prompt + answer
    more = list(session.generate(max_new_tokens=4, **GREEDY))
    assert more == expected(model, prompt + answer, 4)


@every_kind
@pytest.mark.parametrize("n", [0, 1, 13, 39, 40])
def test_after_crop_it_goes_on_as_if_the_rest_had_never_come(flags, kind, n):
    model = tiny_gpt(**flags)
    tokens, more = some_tokens(40), some_tokens(3, 1)
    session, fresh = Session(model, **kind), Session(model, **kind)
    session.extend(tokens)
    session.crop(n)
    assert session.tokens == tokens[:n]
    assert session.cached <= max(n - 1, 0)
    if n and (session.cached or n == 1):
        fresh.extend(tokens[:n])
        fresh.extend(more)
    else:  # nothing is left, all of it comes anew
        fresh.extend(tokens[:n] + more)
    session.extend(more)
    assert list(session.generate(max_new_tokens=6, **GREEDY)) == list(fresh.generate(max_new_tokens=6, **GREEDY))
    with pytest.raises(ValueError, match=rf"cannot crop to {n + 10}: must be in 0\.\.{n + 9}"):
        session.crop(n + 10)


def test_a_stop_sequence_is_not_output_but_part_of_the_sequence():
    model = tiny_gpt()
    drawn = expected(model, FIRST, 9)
    stop = drawn[4:6]
    session = Session(model)
    out = list(session.generate(FIRST, 9, stop_tokens=[stop], **GREEDY))
    assert out == drawn[: next(i for i in range(9) if drawn[i : i + 2] == stop)]
    assert session.tokens == FIRST + out + stop
    assert list(session.generate(max_new_tokens=3, **GREEDY)) == drawn[len(out) + 2 : len(out) + 5]


# -- interruptions


def test_an_answer_may_be_left_at_any_time():
    model = tiny_gpt()
    session = Session(model)
    for stop_after in range(4):
        tokens = session.generate(FIRST, 6, **GREEDY)
        given = [next(tokens) for _ in range(stop_after)]
        tokens.close()
        if stop_after:
            assert session.tokens == FIRST + given
        prompt = [*FIRST, 3, 1]
        assert list(session.generate(prompt, 3, **GREEDY)) == expected(model, prompt, 3)


def test_an_interrupt_inside_the_model_leaves_nothing_wrong():
    model = tiny_gpt()
    session = Session(model)
    list(session.generate(FIRST, 6, **GREEDY))

    def interrupt(x, block_idx, input_pos):
        if block_idx == 1:
            raise KeyboardInterrupt

    for run in (lambda: list(session.generate([*FIRST, 9], 3, **GREEDY)), lambda: session.extend([7, 7])):
        model.set_start_of_layer_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
        model.set_start_of_layer_hook(None)
        assert not model.kv_caches()
        assert list(session.generate([*FIRST, 9], 3, **GREEDY)) == expected(model, [*FIRST, 9], 3)
        assert session.reused == 0


def test_a_generation_that_was_overtaken_does_not_go_on():
    session = Session(tiny_gpt())
    first = session.generate(FIRST, 6, **GREEDY)
    next(first)
    session.extend([1, 2])
    tokens = list(session.tokens)
    with pytest.raises(ValueError, match="session was changed"):
        next(first)
    assert session.tokens == tokens


# -- several on one model


@every_kind
def test_sessions_take_turns_on_one_model_token_by_token(flags, kind):
    model = tiny_gpt(**flags)
    prompts = [some_tokens(n, n) for n in (12, 12, 30)]  # two of one length: nothing but the caches tells them apart
    alone = [list(Session(model, **kind).generate(prompt, 8, **GREEDY)) for prompt in prompts]
    sessions = [Session(model, **kind) for _ in prompts]
    runs = [session.generate(prompt, 8, **GREEDY) for session, prompt in zip(sessions, prompts, strict=True)]
    assert [list(answer) for answer in zip(*zip(*runs, strict=True), strict=True)] == alone


def test_what_others_do_with_the_model_does_not_show_in_a_session_nor_its_caches_in_the_model():
    model = tiny_gpt()
    model.set_kv_caches(1, max_seq_length=32)
    own = model.kv_caches()
    session = Session(model)
    run = session.generate(FIRST, 8, **GREEDY)
    answer = []
    for token in run:
        answer.append(token)
        assert model.kv_caches() == own
        model(torch.tensor([some_tokens(len(session.tokens))]), input_pos=0)  # as long as the session's own sequence
    assert answer == expected(model, FIRST, 8)


@every_kind
def test_a_fork_and_its_origin_go_their_own_ways(flags, kind):
    model = tiny_gpt(**flags)
    tokens = some_tokens(30)
    session = Session(model, **kind)
    session.extend(tokens)
    session.notes["a"] = [1]
    twin = session.fork()
    twin.notes["a"].append(2)
    sizes = counted(model)
    a, b = [list(s.generate([*tokens, end], 6, **GREEDY)) for s, end in ((session, 1), (twin, 2))]
    assert sizes[0] == sizes[6] == 2  # the token left to run, and the new one
    assert session.notes == {"a": [1]}
    for end, answer in ((1, a), (2, b)):
        fresh = Session(model, **kind)
        fresh.extend(tokens)
        assert answer == list(fresh.generate([*tokens, end], 6, **GREEDY))


def test_a_fork_in_the_middle_of_an_answer_has_what_was_said():
    model = tiny_gpt()
    session = Session(model)
    run = session.generate(FIRST, 8, **GREEDY)
    said = [next(run) for _ in range(3)]
    twin = session.fork()
    rest = list(run)
    assert twin.tokens == FIRST + said
    assert list(twin.generate(max_new_tokens=5, **GREEDY)) == rest


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_sessions_forks_and_restored_ones_share_one_compiled_graph(tmp_path):
    torch._dynamo.reset()
    counters.clear()
    model = tiny_gpt(n_layer=1)
    prompts = [some_tokens(n, n) for n in (12, 20)]
    alone = [expected(model, prompt, 6) for prompt in prompts]
    compile_decode(model)
    sessions = [Session(model) for _ in prompts]
    runs = [session.generate(prompt, 6, **GREEDY) for session, prompt in zip(sessions, prompts, strict=True)]
    assert [list(answer) for answer in zip(*zip(*runs, strict=True), strict=True)] == alone
    graphs = counters["stats"]["unique_graphs"]
    sessions[0].save(tmp_path / "s")
    restored, twin = Session(model), sessions[0].fork()
    restored.load(tmp_path / "s")
    assert list(restored.generate(max_new_tokens=4, **GREEDY)) == list(twin.generate(max_new_tokens=4, **GREEDY))
    assert graphs == counters["stats"]["unique_graphs"] == 1


# -- room


@pytest.mark.parametrize("flags", [{}, WINDOW, LATENT], ids=["dense", "sliding windows", "latent attention"])
def test_caches_grow_with_the_sequence_and_keep_what_they_hold(monkeypatch, flags):
    monkeypatch.setattr("litgpt.engine.caches.ROOM", 16)
    model = tiny_gpt(**flags)
    session, sizes = Session(model), counted(model)
    prompt = list(FIRST)
    for _ in range(8):
        sizes.clear()
        answer = list(session.generate(prompt, 8, **GREEDY))
        calls = list(sizes)
        assert answer == expected(model, prompt, 8)
        assert calls[0] == len(prompt) - session.reused <= len(FIRST)
        prompt = prompt + answer + [2]
    assert session.kv_caches[1].cache_length == 128


def test_a_limit_is_that_of_the_context_or_the_caches():
    model = tiny_gpt()
    assert Session(model).limit == 128
    assert Session(model, cache_length=50).limit == 50
    assert Session(model, "lastrec", 16).limit is None
    assert Session(model, "lastrec", 16, n_sink=2).limit == 128


def test_what_makes_no_sense_is_refused_before_any_work():
    model = tiny_gpt()
    session = Session(model)
    session.extend(FIRST)
    sizes = counted(model)
    with pytest.raises(ValueError, match="no key-value cache is called 'h3o'"):
        Session(model, "h3o")
    for run, message in (
        (lambda: list(session.generate([], 3)), "empty"),
        (lambda: list(Session(model).generate(max_new_tokens=3)), "empty"),
        (lambda: session.extend([]), "no tokens"),
        (lambda: list(session.generate([1] * 200, 3)), "203 tokens.*context is 128"),
        (lambda: session.extend([1] * 200), "210 tokens.*context is 128"),
        (lambda: list(session.generate(FIRST, 3, temperature=-1)), "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    assert (session.tokens, session.cached, sizes) == (FIRST, len(FIRST) - 1, [])


# -- saved and restored


@every_kind
@pytest.mark.parametrize("length", [5, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_session_goes_on_bit_identically(flags, kind, length, dtype, tmp_path):
    model = tiny_gpt(**flags).to(dtype)
    session = Session(model, **kind)
    session.extend(some_tokens(length))
    list(session.generate(max_new_tokens=4, **GREEDY))
    session.notes = {"who": "Ümit"}
    session.save(tmp_path / "s")
    other = tiny_gpt(**flags).to(dtype)
    other.load_state_dict(model.state_dict())
    restored, sizes = Session(other, **kind), counted(other)
    restored.load(tmp_path / "s")
    assert (restored.tokens, restored.notes, sizes) == (session.tokens, session.notes, [])
    outputs = []
    for s in (session, restored):
        s.extend([4, 2])
        answer = list(s.generate(max_new_tokens=20, **GREEDY))
        stored = [cache.get_keys_values() for cache in s.kv_caches]
        outputs.append((answer, [kv.keys() for kv in stored], [kv.values() for kv in stored]))
    assert sizes[:2] == [2, 1]
    (answer, *mine), (again, *theirs) = outputs
    assert answer == again
    assert all(torch.equal(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_only_the_slots_in_use_are_saved_and_latent_caches_without_values(tmp_path):
    for flags, per_token in (({}, 2 * 2 * 2 * 16 * 4), (LATENT, 2 * 24 * 4)):
        session = Session(tiny_gpt(**flags))
        sizes = []
        for piece in (10, 50):
            session.extend(some_tokens(piece))
            session.save(tmp_path / "s")
            sizes.append(sum(x.nbytes for name, x in read_session(tmp_path / "s").tensors.items() if name != "tokens"))
        assert sizes == [9 * per_token, 59 * per_token]


def test_an_empty_session_can_be_saved(tmp_path):
    model = tiny_gpt()
    for kind in ({}, {"kv_cache": "lastrec", "cache_length": 8}):
        Session(model, **kind).save(tmp_path / "s")
        session = Session(model, **kind)
        session.load(tmp_path / "s")
        assert list(session.generate(FIRST, 3, **GREEDY)) == list(Session(model, **kind).generate(FIRST, 3, **GREEDY))


def test_dense_caches_of_another_length_take_what_fits(tmp_path):
    model = tiny_gpt()
    session = Session(model)
    session.extend(FIRST)
    session.save(tmp_path / "s")
    longer, shorter = Session(model, cache_length=64), Session(model, cache_length=8)
    longer.load(tmp_path / "s")
    assert list(longer.generate(max_new_tokens=4, **GREEDY)) == expected(model, FIRST, 4)
    with pytest.raises(ValueError, match=r"s does not fit the caches: .*8"):
        shorter.load(tmp_path / "s")
    assert not shorter.tokens


def test_factors_of_long_rope_are_restored(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_seq_len": 32, "factor": 4.0}
    model = tiny_gpt(rope_adjustments=factors)
    session, prompt = Session(model), some_tokens(40)
    session.extend(prompt)
    session.save(tmp_path / "s")
    list(Session(model).generate(FIRST, 3, **GREEDY))  # turned by the short factors
    restored, sizes = Session(model), counted(model)
    restored.load(tmp_path / "s")
    answer = list(restored.generate(max_new_tokens=5, **GREEDY))
    assert sizes[0] == 1
    assert answer == expected(model, prompt, 5)


def test_a_session_of_another_model_precision_or_kind_is_refused_and_nothing_changes(tmp_path):
    model = tiny_gpt()
    session = Session(model)
    session.extend(some_tokens(30))
    session.save(tmp_path / "s")
    windows = tiny_gpt(**WINDOW)
    of_windows = Session(windows)
    of_windows.extend(some_tokens(30))
    of_windows.save(tmp_path / "w")
    tuned = tiny_gpt()
    tuned.load_state_dict(model.state_dict())
    with torch.no_grad():
        tuned.transformer.h[1].mlp.proj.weight += 0.001
    turned = tiny_gpt(rope_base=5000)  # the same weights, put to another use
    turned.load_state_dict(model.state_dict())
    for path, other, message in (
        ("s", Session(tiny_gpt()), "another model, '', or with other weights of it: use those"),
        ("s", Session(tuned), "other weights"),
        ("s", Session(turned), "another model"),
        ("s", Session(tiny_gpt(n_layer=3)), "another model"),
        (
            "s",
            Session(tiny_gpt().bfloat16()),
            "holds float32, the model computes in bfloat16: load the model in the prec",
        ),
        ("s", Session(model, "lastrec", 24), "kv_cache='dense', cache_length=None, this session has.*lastrec"),
        ("w", Session(windows, cache_length=100), "cache_length=None.*cache_length=100.*use the same"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            other.load(tmp_path / path)
        assert str(tmp_path / path) in str(error.value)
        assert "\n" not in str(error.value)
        assert (other.tokens, other.cached) == ([], 0)
    lastrec = Session(model, "lastrec", 24)
    lastrec.extend(some_tokens(30))
    lastrec.save(tmp_path / "s")
    for kind in (("lastrec", 25), (CacheSpec("lastrec", cache_length=24, n_sink=1),), ("dense", None)):
        with pytest.raises(ValueError, match="use the same, or begin a new session"):
            Session(model, *kind).load(tmp_path / "s")


def test_a_refused_file_leaves_the_session_as_it_was(tmp_path):
    model = tiny_gpt()
    other = Session(tiny_gpt())
    other.extend(FIRST)
    other.save(tmp_path / "s")
    session = Session(model)
    answer = list(session.generate(FIRST, 3, **GREEDY))
    for path, error in ((tmp_path / "s", ValueError), (tmp_path / "none", FileNotFoundError)):
        with pytest.raises(error):
            session.load(path)
    more = list(session.generate(max_new_tokens=3, **GREEDY))
    assert more == expected(model, FIRST + answer, 3)
    assert session.cached == len(FIRST) + 3 + 2


def test_a_file_whose_two_bits_lie_in_an_older_order_is_refused_in_one_line(tmp_path):
    model, spec = tiny_gpt(block_size=512), CacheSpec.parse("dense-kivi", 512)
    session = Session(model, spec)
    session.extend(some_tokens(300))
    session.save(tmp_path / "new")
    file = read_session(tmp_path / "new")
    by_token = {k: x.reshape(1, 2, 128, -1) if k.endswith("key_codes") else x for k, x in file.tensors.items()}
    write_session(tmp_path / "old", file.about, by_token)
    fresh = Session(model, spec)
    with pytest.raises(ValueError, match="old does not fit the caches: key_codes .* begin a new session") as error:
        fresh.load(tmp_path / "old")
    assert "\n" not in str(error.value)
    assert not fresh.tokens
    fresh.load(tmp_path / "new")
    assert fresh.tokens == session.tokens


# -- fingerprints


def test_a_fingerprint_knows_weights_whatever_their_layout():
    model = tiny_gpt(mlp_class_name="LLaMAMLP").bfloat16()
    if not can_pack(model.transformer.wte.weight):
        pytest.skip("no packed products here")
    plain = fingerprint(model)
    model.set_kv_caches(1)
    pack_linears(model)
    assert fingerprint(model) == plain


def test_a_fingerprint_sees_a_change_of_any_weight():
    model = tiny_gpt(n_layer=1)
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        kept = parameter.clone()
        for part in (slice(None), slice(-len(kept) // 8, None), slice(len(kept) // 8)):
            parameter.data[part] += 0.01
            seen.add(fingerprint(model))
            parameter.data = kept.clone()
    assert len(seen) == 1 + 3 * len(list(model.parameters()))


def test_a_fingerprint_does_not_depend_on_a_models_name_or_context():
    config = tiny_gpt().config
    model = GPT(config)
    renamed = GPT(Config(**{**config.to_dict(), "name": "other", "block_size": 64}))
    renamed.load_state_dict(model.state_dict())
    assert fingerprint(renamed) == fingerprint(model)


# -- import


def test_the_package_does_not_import_sessions_before_they_are_asked_for():
    code = "import sys, litgpt.engine; assert 'torch' not in sys.modules; litgpt.engine.Session; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="Sessions"):
        importlib.import_module("litgpt.generate").Sessions  # noqa: B018


# -- real models


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_session_of_gemma_goes_on_past_its_windows(gemma_gguf, dtype, tmp_path):
    from litgpt.checkpoint.load import load_model

    model = load_model(gemma_gguf, dtype=dtype)
    prompt = [2, *some_tokens(530)]  # the windows have 512 tokens
    session = Session(model)
    session.extend(prompt)
    assert any(type(cache) is not type(session.kv_caches[5]) for cache in session.kv_caches)
    assert all(isinstance(cache, DefaultKVCache) for cache in session.kv_caches)
    session.save(tmp_path / "s")
    restored = Session(model)
    restored.load(tmp_path / "s")
    answers = []
    for s in (session, restored):
        s.extend([4, 2])
        answers.append(list(s.generate(max_new_tokens=8, **GREEDY)))
    assert answers[0] == answers[1]
    if dtype == torch.float32:
        assert answers[0] == list(Session(model).generate([*prompt, 4, 2], 8, **GREEDY))


@every_kind
def test_predictions_are_those_of_generation_and_do_not_depend_on_calls(flags, kind):
    model, tokens = tiny_gpt(**flags), some_tokens(60)
    first = Session(model, **kind, prompt_chunksize=7)
    first.extend(tokens[:20])
    logits = first.predict(tokens[20:])
    second = Session(model, **kind, prompt_chunksize=7)
    second.extend(tokens[:20])
    one_by_one = torch.cat([second.predict([token]) for token in tokens[20:]])
    torch.testing.assert_close(one_by_one, logits, rtol=1e-3, atol=1e-4)
    assert first.tokens == second.tokens == tokens
    assert first.cached == len(tokens) - 1
    drawn = list(first.generate(max_new_tokens=5, **GREEDY))
    third = Session(model, **kind, prompt_chunksize=7)
    third.extend(tokens)
    assert third.predict(drawn).argmax(-1).tolist() == drawn
    if kind.get("kv_cache", "dense") == "dense":
        torch.testing.assert_close(logits, model(torch.tensor([tokens]))[0, 19:-1], rtol=1e-3, atol=1e-4)


def test_an_empty_session_and_too_many_tokens_are_refused():
    session = Session(tiny_gpt(), cache_length=30)
    with pytest.raises(ValueError, match="empty session predicts nothing"):
        session.predict([1])
    session.extend(FIRST)
    with pytest.raises(ValueError, match="comes? to 31 tokens"):
        session.predict([1] * 21)
    assert session.tokens == FIRST


class AllLayers:
    """A layer runner that notes the calls it could run, and leaves them to the model's layers."""

    static_shapes, runs_head = False, False

    def __init__(self):
        self.steps = []

    def __call__(self, idx, rope, plans, input_pos, output_tokens=None, head=False):
        self.steps.append(len(plans[0].parts[0].steps))

    def runs_evictions(self, caches):
        return False


@pytest.mark.parametrize("kind", ["snapkv", "h2o"])
def test_calls_end_where_tokens_are_evicted_so_that_a_layer_runner_runs_them(kind):
    args = {"kv_cache": kind, "cache_length": 24, "tail": 6, "prompt_chunksize": 20}
    model = tiny_gpt()
    plain = Session(model, **args)
    plain.extend(some_tokens(70))
    model.layer_runner = AllLayers()
    session = Session(model, **args)
    session.extend(some_tokens(70))
    assert model.layer_runner.steps == [1] * len(model.layer_runner.steps)
    assert len(model.layer_runner.steps) > 8
    for a, b in zip(plain.kv_caches, session.kv_caches, strict=True):
        assert torch.equal(a.token_positions(), b.token_positions())
        torch.testing.assert_close(a.get_keys_values().keys(), b.get_keys_values().keys(), atol=1e-5, rtol=1e-5)
