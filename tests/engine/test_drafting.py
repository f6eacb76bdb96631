import random

import pytest
import torch
from tiny import StaticShapes, greedy_without_caches, tiny_gpt

from litgpt.engine.drafting import DraftModel, PromptLookup
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence

GREEDY = Sampling(temperature=0.0)


def row_of(tokens, sampling=GREEDY):
    return Sequence(torch.tensor(list(tokens)), 10_000, sampling)


# --- prompt lookup


def continuation_by_scan(tokens, longest, shortest, count):
    """What followed the latest earlier occurrence of the longest ending, found by looking everywhere."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text, place = list(tokens), start + size
                while len(text) < len(tokens) + count:
                    text.append(text[place + len(text) - len(tokens)])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize(("longest", "shortest"), [(1, 1), (2, 2), (4, 2), (3, 1)])
def test_a_lookup_finds_what_a_scan_of_the_whole_text_finds(longest, shortest):
    rng = random.Random(7)
    for alphabet in (2, 5, 20):
        row = row_of([rng.randrange(alphabet)])
        lookup = PromptLookup(1, longest, shortest)  # one draft token: their number never changes
        found = 0
        for _ in range(150):
            ((draft_tokens, certain),) = lookup.draft([row], [9])
            assert certain is None
            assert list(draft_tokens) == continuation_by_scan(row.tokens, longest, shortest, 1)
            found += len(draft_tokens)
            row.tokens += [rng.randrange(alphabet) for _ in range(rng.choice((1, 1, 2, 5)))]
        assert found


def test_copies_may_overlap_themselves():
    row, lookup = row_of([7, 8, 1, 2, 3, 1, 2, 3, 1, 2]), PromptLookup(8)
    ((draft_tokens, _),) = lookup.draft([row], [9])
    assert draft_tokens == [3, 1, 2]
    row.tokens += [3, 1, 2, 3]
    ((draft_tokens, _),) = lookup.draft([row], [9])
    assert draft_tokens == [1, 2, 3, 1, 2, 3]


class Counted(list):
    """A list that counts how many of its elements are looked at."""

    seen = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        Counted.seen += len(found) if isinstance(key, slice) else 1
        return found


def test_a_lookup_takes_the_same_work_whatever_the_length_of_the_text():
    work = []
    for length in (100, 10_000):
        row = row_of([0])
        row.tokens = Counted([*range(length), 1, 2])
        lookup = PromptLookup(8)
        lookup.draft([row], [8])
        Counted.seen = 0
        for token in (3, 4, 99):
            row.tokens.append(token)
            lookup.draft([row], [8])
        work.append(Counted.seen)
    assert work[0] == work[1]


def test_the_number_of_draft_tokens_follows_how_many_were_accepted():
    row, lookup = row_of([*range(50), *range(2)]), PromptLookup(16)

    def draft(limit=100):
        ((draft_tokens, _),) = lookup.draft([row], [limit])
        return draft_tokens

    assert draft() == [2, 3, 4]
    row.tokens += range(2, 6)  # all of them and one more
    assert draft() == list(range(6, 12))
    row.tokens += range(6, 13)
    assert draft() == list(range(13, 25))
    row.tokens += range(13, 26)
    assert draft() == list(range(26, 42))  # the most
    row.tokens += [26, 27, 28, 29, 3, 4]  # four accepted
    assert draft() == list(range(5, 13))
    row.tokens += [0, 1]  # none did
    assert draft() == [2, 3, 4]
    assert draft(limit=1) == [2]


def test_rows_are_told_apart_and_forgotten():
    lookup = PromptLookup(4, min_ngram=1)
    rows = [row_of([1, 2, 1]), row_of([1, 3, 1])]
    assert [list(tokens) for tokens, _ in lookup.draft(rows, [1, 1])] == [[2], [3]]
    assert [list(tokens) for tokens, _ in lookup.draft(rows[::-1], [1, 1])] == [[3], [2]]
    rows.pop()
    assert len(lookup._indexes) == 1


@pytest.mark.parametrize("settings", [{"max_draft": 0}, {"max_ngram": 1, "min_ngram": 2}, {"min_ngram": 0}])
def test_numbers_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=r"at least 1|min_ngram"):
        PromptLookup(**settings)
    with pytest.raises(ValueError, match="at least 1"):
        DraftModel(tiny_gpt(), 100, count=0)


# --- draft model


@pytest.mark.parametrize("kind", ["dense", "windows", "static"])
def test_draft_tokens_are_the_draft_models_greedy_tokens_whether_or_not_the_last_ones_were_accepted(kind):
    """Rows join, leave and change places; any number of their draft tokens is accepted: the caches stay in step."""
    rng = random.Random(3)
    options = {"sliding_window_size": 8, "sliding_window_indices": [1, 0]} if kind == "windows" else {}
    model = tiny_gpt(block_size=256, **options)
    model.layer_runner = StaticShapes() if kind == "static" else None
    draft = DraftModel(model, 100, 4, prompt_chunksize=7)
    rows = [row_of([rng.randrange(100) for _ in range(length)]) for length in (2, 100, 9)]
    for step in range(40):
        limits = [rng.randint(1, 6) for _ in rows]
        for row, limit, (draft_tokens, certain) in zip(rows, limits, draft.draft(rows, limits), strict=True):
            assert certain is None
            assert len(draft_tokens) == min(4, limit)
            assert draft_tokens == greedy_without_caches(model, torch.tensor(row.tokens), len(draft_tokens)).tolist()
            row.tokens += draft_tokens[: rng.randint(0, len(draft_tokens))]
            row.tokens.append(rng.randrange(100))
        if step % 4 == 3:
            rows.pop(rng.randrange(len(rows)))
        if step % 5 == 4 or not rows:
            rows.append(row_of([rng.randrange(100) for _ in range(rng.randint(2, 30))]))
        if step % 7 == 6:
            rng.shuffle(rows)


def test_a_row_that_was_not_asked_for_a_while_is_followed_again():
    model = tiny_gpt()
    draft, row, other = DraftModel(model, 100), row_of([5, 6]), row_of([7, 8, 9])
    for _ in range(2):
        for (draft_tokens, _), asked in zip(draft.draft([row, other], [3, 3]), (row, other), strict=True):
            assert draft_tokens == greedy_without_caches(model, torch.tensor(asked.tokens), 3).tolist()
        row.tokens += [1, 2, 3, 4, 5, 6, 7]
        other.tokens.append(4)


def test_sampled_draft_tokens_come_with_their_distributions():
    model, sampling = tiny_gpt(), Sampling(temperature=0.5, top_k=5, seed=1)
    row = row_of([1, 2, 3], sampling)
    ((draft_tokens, distributions),) = DraftModel(model, 100).draft([row], [3])
    for i in range(3):
        logits = model(torch.tensor([[*row.tokens, *draft_tokens[:i]]]))[0, -1]
        values, tokens = logits.topk(5)
        reference = torch.zeros(100).scatter(0, tokens, (values / 0.5).softmax(0))
        assert torch.allclose(distributions[i], reference, atol=1e-5)
        assert reference[draft_tokens[i]] > 0


@pytest.mark.parametrize("size", [90, 120])
def test_distributions_cover_the_other_models_vocabulary(size):
    draft = DraftModel(tiny_gpt(vocab_size=90, padded_vocab_size=size), 100, 40)
    ((draft_tokens, distributions),) = draft.draft([row_of([1, 2, 3], Sampling(temperature=5.0))], [40])
    assert distributions.shape == (40, 100)
    assert torch.allclose(distributions.sum(-1), torch.ones(40))
    assert max(draft_tokens) < 100


def test_nothing_is_drafted_beyond_the_draft_models_context():
    draft = DraftModel(tiny_gpt(block_size=16), 100, 3)
    assert len(draft.draft([row_of(range(13))], [3])[0][0]) == 3
    assert len(draft.draft([row_of(range(14))], [3])[0][0]) == 0
