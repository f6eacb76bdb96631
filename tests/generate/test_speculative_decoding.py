import copy
import io
import random

import pytest
import torch
from tiny import VOCABULARY, StaticShapes, create_kv_caches, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.engine.caches import prepare_caches
from litgpt.engine.drafting import Draft, DraftModel, PromptLookup
from litgpt.engine.engine import Engine, decode
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.engine.session import Session
from litgpt.generate.speculative_decoding import check_same_vocabulary, generate, speculative_decoding

GREEDY = Sampling(temperature=0.0)
WINDOWS = {"sliding_window_size": 8, "sliding_window_indices": [1, 0]}


def almost(model, deviation=0.02):
    """A model that often says the same."""
    draft = copy.deepcopy(model)
    draft.clear_kv_caches(assigned=True)
    for parameter in draft.parameters():
        parameter.data += deviation * torch.randn_like(parameter)
    return draft


class Oracle:
    """Knows how sequences go on, and gives a random number of right guesses and then wrong ones."""

    def __init__(self, answers, most=6):
        self.answers, self.most, self.chance = answers, most, random.Random(5)

    def draft(self, rows, limits):
        guesses = []
        for row, limit in zip(rows, limits, strict=True):
            known = self.answers[tuple(row.tokens[: row.prompt_length])][len(row.tokens) - row.prompt_length :]
            count = self.chance.randint(0, min(limit, self.most, len(known)))
            right = self.chance.randint(0, count)
            guesses.append(Draft([*known[:right], *[(token + 1) % 100 for token in known[right:count]]]))
        return guesses


def run(model, prompts, new, drafter=None, sampling=GREEDY, stops=(), chunksize=None, **kwargs):
    """Each prompt's tokens by step, and the engine."""
    limits = new if isinstance(new, list) else [new] * len(prompts)
    sequences = [
        Sequence(prompt, limit, sampling, stops, **kwargs) for prompt, limit in zip(prompts, limits, strict=True)
    ]
    engine = Engine(model, chunksize, drafter)
    prepare_caches(model, len(sequences), max(sequence.max_length for sequence in sequences))
    pieces = [[] for _ in prompts]
    for step in decode(engine, sequences):
        for row, tokens in zip(pieces, step, strict=True):
            row += [tokens] if tokens else []
    assert [sum(row, []) for row in pieces] == [sequence.output for sequence in sequences]
    return pieces, sequences, engine


def outputs(*args, **kwargs):
    return [sequence.output for sequence in run(*args, **kwargs)[1]]


def drafters(model, prompts, new):
    plain = outputs(model, prompts, new)
    answers = {tuple(prompt.tolist()): row for prompt, row in zip(prompts, plain, strict=True)}
    return plain, {
        "oracle": Oracle(answers),
        "draft": DraftModel(almost(model), 100, 4),
        "lookup": PromptLookup(min_ngram=1),
    }


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 100, (n,), generator=generator).repeat(2) for n in (4, 15, 1, 9)]


@pytest.mark.parametrize("caches", ["dense", "windows", "lastrec", "static", "chunks"])
@pytest.mark.parametrize("drafter", ["oracle", "draft", "lookup"])
def test_greedy_output_is_that_of_plain_decoding(prompts, drafter, caches):
    model = tiny_gpt(block_size=256, **(WINDOWS if caches == "windows" else {}))
    model.layer_runner = StaticShapes() if caches == "static" else None
    if caches == "lastrec":  # evicts soon
        model.assign_kv_caches(create_kv_caches("lastrec", model.config, 4, 24, n_sink=2))
    limits = [45, 60, 20, 35]
    plain, guessers = drafters(model, prompts, limits)
    if caches != "lastrec":
        for prompt, row in zip(prompts, plain, strict=True):
            assert row == greedy_without_caches(model, prompt, len(row)).tolist()
    chunksize = 3 if caches == "chunks" else None
    pieces, sequences, engine = run(model, prompts, limits, guessers[drafter], chunksize=chunksize)
    assert [sequence.output for sequence in sequences] == plain
    assert 0 < engine.n_accepted < engine.n_drafted
    steps = [[len(piece) for piece in row[:15]] for row in pieces]
    assert drafter != "oracle" or any(row != steps[0] for row in steps)  # rows go at their own pace


def test_caches_that_evicted_are_asked_for_as_few_guesses_as_they_can_take_back(prompts):
    model, given = tiny_gpt(block_size=256), []
    model.assign_kv_caches(create_kv_caches("lastrec", model.config, 1, 24))

    class Noted(Oracle):
        def draft(self, rows, limits):
            given.append((len(rows[0].tokens), limits[0]))
            return super().draft(rows, limits)

    for prompt in prompts[:2]:  # of 8 and of 30 tokens
        plain = outputs(model, [prompt], 30)
        assert outputs(model, [prompt], 30, Noted({tuple(prompt.tolist()): plain[0]})) == plain
    # 24 slots, one more token to run than guesses; after the 24th token the last one can be taken back, and no other
    assert all(limit == 24 - length if length < 24 else limit == 1 for length, limit in given if limit)
    assert {length < 24 for length, _ in given} == {True, False}


def test_stop_sequences_inside_guesses_end_the_text_where_plain_decoding_does(prompts):
    model = tiny_gpt(block_size=256)
    free, guessers = drafters(model, prompts, 60)
    stops = [free[0][21:23], free[1][30:31], free[2][11:14]]
    for include_eos in (False, True):
        plain = outputs(model, prompts, 60, stops=stops, include_eos=include_eos)
        assert plain != free
        for drafter in guessers.values():
            _, sequences, _ = run(model, prompts, 60, drafter, stops=stops, include_eos=include_eos)
            assert [sequence.output for sequence in sequences] == plain
            assert all(sequence.finish_reason in ("stop", "length") for sequence in sequences)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 8])
def test_limits_are_kept(prompts, new):
    model = tiny_gpt(block_size=32)  # the longest prompt and one more token fill the context
    plain, guessers = drafters(model, prompts[1:2], min(new, 2))
    assert outputs(model, prompts[1:2], min(new, 2), guessers["oracle"]) == plain
    plain, guessers = drafters(model, prompts[:1], new)
    for drafter in guessers.values():
        assert outputs(model, prompts[:1], new, drafter) == plain
        assert len(plain[0]) == new


def test_a_certain_guess_changes_no_sampled_token(prompts):
    model = tiny_gpt(block_size=256)
    model.lm_head.weight.data *= 0.3
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=9)
    plain = outputs(model, prompts, 80, sampling=sampling)
    answers = {tuple(prompt.tolist()): row for prompt, row in zip(prompts, plain, strict=True)}
    for drafter in (Oracle(answers), PromptLookup(min_ngram=1)):
        _, sequences, engine = run(model, prompts, 80, drafter, sampling=sampling)
        assert [sequence.output for sequence in sequences] == plain
        assert engine.n_accepted


def test_sampled_rows_with_a_draft_are_reproduced_by_their_seeds(prompts):
    model = tiny_gpt(block_size=256)
    draft, sampling = almost(model), Sampling(temperature=0.8, seed=4)
    together = outputs(model, prompts, 40, DraftModel(draft, 100), sampling=sampling)
    alone = [outputs(model, [prompt], 40, DraftModel(draft, 100), sampling=sampling)[0] for prompt in prompts]
    assert together == alone


class NoneTwice:
    """Allows no token twice. Keeps what was drawn, and so has to be told of every token once, in order."""

    def __init__(self):
        self.drawn = None

    def __call__(self, tokens, logits):
        self.drawn = [] if self.drawn is None else [*self.drawn, tokens[-1]]
        assert self.drawn == tokens[len(tokens) - len(self.drawn) :]
        return logits.index_fill(0, torch.tensor(self.drawn, dtype=torch.int64), -torch.inf)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_processors_that_keep_state_see_the_tokens_that_stand(prompts, temperature):
    model = tiny_gpt(block_size=256)
    sampling = Sampling(temperature=temperature, processors=(NoneTwice(),), seed=3)
    plain = outputs(model, prompts, 40, sampling=sampling)
    answers = {tuple(prompt.tolist()): row for prompt, row in zip(prompts, plain, strict=True)}
    assert all(len(set(row)) == 40 for row in plain)
    for drafter in (Oracle(answers), DraftModel(almost(model), 100, 3)):
        _, sequences, engine = run(model, prompts, 40, drafter, sampling=sampling)
        assert all(len(set(sequence.output)) == 40 for sequence in sequences)
        assert engine.n_accepted
        if temperature == 0 or isinstance(drafter, Oracle):
            assert [sequence.output for sequence in sequences] == plain


def test_log_probabilities_are_those_of_plain_decoding(prompts):
    model = tiny_gpt(block_size=256)
    _, guessers = drafters(model, prompts, 40)
    _, plain, _ = run(model, prompts, 40, logprobs=2)
    _, guessed, _ = run(model, prompts, 40, guessers["oracle"], logprobs=2)
    for one, other in zip(plain, guessed, strict=True):
        assert other.token_logprobs == pytest.approx(one.token_logprobs, abs=1e-4)
        assert [set(step) for step in other.top_logprobs] == [set(step) for step in one.top_logprobs]


def test_guesses_that_stand_save_calls_and_come_together(prompts):
    model, calls = tiny_gpt(), []
    draft = DraftModel(copy.deepcopy(model), 100, 4)
    model.set_start_of_layer_hook(lambda x, block_idx, input_pos: calls.append(x.shape[1]) if block_idx == 0 else None)
    (pieces,), _, engine = run(model, prompts[:1], 21, draft)
    assert calls == [8, 5, 5, 5, 5]
    assert [len(piece) for piece in pieces] == [1, 5, 5, 5, 5]
    assert (engine.n_drafted, engine.n_accepted) == (16, 16)


# --- the functions that scripts call


def test_generate_gives_the_targets_tokens_and_the_rate_of_acceptance(prompts):
    target = tiny_gpt()
    plain = greedy_without_caches(target, prompts[1], 30)
    for draft, low, high in ((almost(target), 0.01, 0.99), (copy.deepcopy(target), 1, 1), (tiny_gpt(), 0, 0.3)):
        draft.set_kv_caches(1)
        tokens, rate = generate(draft, target, prompts[1], 60, temperature=0.0, speculative_k=3)
        assert torch.equal(tokens, torch.cat((prompts[1], plain)))
        assert low <= rate <= high
    stop = plain[7:9].tolist()
    tokens, _ = generate(
        draft, target, prompts[1], 60, temperature=0.0, speculative_k=5, stop_tokens=[stop], include_prompt=False
    )
    assert tokens.tolist() == plain[:7].tolist()


def test_generate_refuses_what_means_nothing(prompts):
    target = tiny_gpt()
    for settings, words in (
        ({"speculative_k": 0}, "at least 1"),
        ({"speculative_k": 2, "max_returned_tokens": 8}, "leaves no room"),
        ({"speculative_k": 2, "max_returned_tokens": 999}, "context is 128"),
        ({"speculative_k": 2, "top_p": 2.0}, "top_p"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(tiny_gpt(), target, prompts[0], **{"max_returned_tokens": 20, **settings})


def test_a_session_goes_on_exactly_after_guesses(prompts):
    model = tiny_gpt(block_size=256)
    plain, guessing = Session(model), Session(model)
    for text in (prompts[1].tolist(), prompts[3].tolist(), prompts[0].tolist()):
        one = list(plain.generate(plain.tokens + text, 25, temperature=0))
        answers = {tuple(guessing.tokens + text): one}
        other = list(guessing.generate(guessing.tokens + text, 25, temperature=0, drafter=Oracle(answers)))
        assert one == other
        assert plain.tokens == guessing.tokens
        assert plain.reused == guessing.reused


def test_the_llm_answers_as_without_guesses_and_tells_the_rate():
    llm = LLM(tiny_gpt(block_size=512, **VOCABULARY), Preprocessor(tiny_tokenizer()))
    llm.distribute("cpu", precision="32-true")
    settings = {"logit_bias": {50: 99.0, 60: 99.0}, "seed": 5, "max_new_tokens": 60, "return_as_token_ids": True}
    for prompt in ("abcabcabc", ["abab", "a", "cdcdcdcdcd"]):
        plain = llm.generate(prompt, **settings)
        assert llm.acceptance_rate == 0
        guessed = llm.generate(prompt, prompt_lookup=8, **settings)
        assert 0 < llm.acceptance_rate < 1
        pairs = [(plain, guessed)] if isinstance(prompt, str) else zip(plain, guessed, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="at least 1"):
        llm.generate("a", prompt_lookup=0)


@pytest.mark.parametrize("k", [1, 3])
def test_steps_by_hand_make_the_targets_text(prompts, k):
    target = tiny_gpt()
    for draft in (almost(target), copy.deepcopy(target)):
        for model in (draft, target):
            model.set_kv_caches(1)
            model(prompts[0][:-1], 0)
        tokens = prompts[0].tolist()
        while len(tokens) < 60:
            new = speculative_decoding(
                draft, target, torch.tensor(tokens[-1:]), len(tokens) - 1, speculative_k=k, temperature=0.0
            )
            assert 1 <= len(new) <= k + 1
            tokens += new.tolist()
            assert draft.next_token_pos == target.next_token_pos == len(tokens) - 1
        assert tokens[8:] == greedy_without_caches(target, prompts[0], len(tokens) - 8).tolist()


def test_a_step_by_hand_refuses_more_guesses_than_can_be_taken_back(prompts):
    draft, target = tiny_gpt(), tiny_gpt()
    target.assign_kv_caches(create_kv_caches("lastrec", target.config, 1, 6))
    draft.set_kv_caches(1)
    for model in (draft, target):
        model(prompts[0][:-1], 0)
    with pytest.raises(ValueError, match=r"1\.\.1"):
        speculative_decoding(draft, target, prompts[0][-1:], 7, speculative_k=2)
    assert len(speculative_decoding(draft, target, prompts[0][-1:], 7, speculative_k=1)) in (1, 2)


# --- the commands


def save(folder, model, tokenizer=None):
    LLM(model, Preprocessor(tiny_tokenizer() if tokenizer is None else tokenizer)).save(folder, "alpaca")
    return str(folder)


def test_the_commands_answer_as_plain_decoding_does_and_tell_how_many_draft_tokens_were_accepted(tmp_path, capsys):
    target = tiny_gpt(block_size=512, **VOCABULARY)
    draft, large = save(tmp_path / "draft", almost(target, 0.005)), save(tmp_path / "large", target)
    args = ["--prompt", "abcabcabc", "--max_new_tokens", "30", "--precision", "32-true"]
    for more in (["--temperature", "0"], ["--temperature", "0", "--num_samples", "2", "--kv_cache", "lastrec"]):
        assert main(["generate", large, *args, *more]) == 0
        plain = capsys.readouterr()
        assert "stood" not in plain.err
        assert main(["generate", large, *args, *more, "--prompt_lookup", "8"]) == 0
        looked_up = capsys.readouterr()
        assert main(["generate_speculatively", draft, large, *args, *more]) == 0
        guessed = capsys.readouterr()
        assert guessed.out == looked_up.out == plain.out != ""
        assert "draft tokens accepted" in guessed.err
        assert "draft tokens accepted" in looked_up.err


def test_a_conversation_with_guesses_is_the_one_without(tmp_path, capsys, monkeypatch):
    model = save(tmp_path / "model", tiny_gpt(block_size=512, **VOCABULARY))
    answers = []
    for more in ([], ["--prompt_lookup", "6"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("abcabc\nabc\nabcabc\n/exit\n"))
        assert (
            main(["chat", model, "--temperature", "0", "--max_new_tokens", "30", "--precision", "32-true", *more]) == 0
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_models_with_different_vocabularies_are_refused_before_they_are_loaded(tmp_path, capsys, monkeypatch):
    import tokenizers

    from litgpt.tokenizer import Tokenizer

    other = tiny_tokenizer().processor
    vocabulary = other.get_vocab()
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    swapped = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    swapped = Tokenizer.from_tokenizers(swapped, bos_id=None, eos_id=0, use_bos=False)
    draft = save(tmp_path / "draft", tiny_gpt(**VOCABULARY), swapped)
    large = save(tmp_path / "large", tiny_gpt(**VOCABULARY))
    monkeypatch.setattr("litgpt.generate.speculative_decoding.make_ready", None)
    assert main(["generate_speculatively", draft, large]) == 1
    message = capsys.readouterr().err
    assert "same vocabulary" in message
    assert "'A'" in message
    assert message.count("\n") == 1
    check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "m", "--prompt_lookup", "0"], "prompt_lookup must be at least 1"),
        (["generate_speculatively", "d", "m", "--speculative_k", "0"], "speculative_k must be at least 1"),
        (["generate_speculatively", "d", "m", "--max_new_tokens", "0"], "max_new_tokens"),
        (["generate_speculatively", "d"], "target_model_checkpoint_dir is missing"),
    ],
)
def test_options_that_mean_nothing_are_refused(args, words, capsys):
    assert main(args) in (1, 2)
    assert words in capsys.readouterr().err
