import math

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from litgpt.engine.drawing import draw
from litgpt.engine.sampling import (
    NO_TOKEN,
    Sampling,
    batched_sample,
    draw_rows,
    likeliest,
    pick,
    probabilities,
    sample,
    sample_top_p,
)
from litgpt.engine.sequence import Sequence

DRAWS = 20_000


def row_of(sampling, prompt=(0,)):
    return Sequence(torch.tensor(prompt), 100, sampling)


def expected_distribution(logits, temperature, top_k, top_p):
    """By definition, one token at a time, in plain Python."""
    values = [float(x) for x in logits]
    order = sorted(range(len(values)), key=lambda i: -values[i])[: top_k or len(values)]
    weights = {i: torch.tensor(values[i] / temperature, dtype=torch.float64).exp().item() for i in order}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for i in order:
        if kept and mass >= top_p:
            break
        kept[i] = weights[i] / total
        mass += kept[i]
    total = sum(kept.values())
    return torch.tensor([kept.get(i, 0.0) / total for i in range(len(values))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 99])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.9, 1.0])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.5, 2.5, -2.0])
    drawn = draw_rows(logits.expand(DRAWS, -1), Sampling(temperature, top_k, top_p))
    share = torch.bincount(drawn, minlength=len(logits)) / DRAWS
    expected = expected_distribution(logits, temperature, top_k, top_p)
    torch.testing.assert_close(share, expected, atol=0.02, rtol=0)
    assert (share[expected == 0] == 0).all()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(50, 33)
    greedy = {"temperature": 0.0, "top_p": 0.3}
    assert torch.equal(batched_sample(logits[:, None], greedy), logits.argmax(-1)[:, None])


def test_sample_draws_for_the_last_position_of_the_first_row():
    logits = torch.tensor([[[0.0, 9.0, 1.0], [7.0, 2.0, 1.0]], [[0.0, 0.0, 9.0], [0.0, 9.0, 0.0]]])
    for shaped in (logits, logits[0], logits[0, -1]):
        assert sample(shaped, temperature=0.0).tolist() == [0]
    assert batched_sample(logits, {"temperature": 0.0}).tolist() == [[0], [1]]
    assert batched_sample(list(logits), [{"top_k": 1}, {"temperature": 0.0}]).tolist() == [[0], [1]]


def test_sample_takes_probabilities_as_they_are_where_asked_to():
    probs = torch.tensor([0.6, 0.4, 0.0])
    drawn = [sample(probs, apply_softmax=False).item() for _ in range(2000)]
    assert abs(drawn.count(0) / 2000 - 0.6) < 0.05
    assert drawn.count(2) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, -100.0, 100.0])
def test_the_first_of_equally_likely_tokens_is_taken(dtype, shift):
    rows = [[0, 3, -1, 3], [-2, -1, -1, -3], [-0.0, 0.0, 0.0, -1], [float("-inf"), 0.5, 0.25, 0.5]]
    logits = (torch.tensor(rows) + shift).to(dtype)
    for some in (logits, *logits[:, None]):  # also where one row is all there is
        assert torch.equal(likeliest(some), some.float().argmax(-1))


def test_batched_sample_gives_every_row_its_settings():
    logits = [torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[0.0, 5.0, 1.0]])]
    tokens = torch.cat([batched_sample(logits, [{"temperature": 0.0}, {"temperature": 1e6}]) for _ in range(200)], 1)
    assert set(tokens[0].tolist()) == {1}
    assert set(tokens[1].tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="2 logits but 1"):
        batched_sample(logits, [{}])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_p, kept in [(0.0, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4)]:
        assert sample_top_p(logits, top_p).isfinite().sum() == kept


@pytest.mark.parametrize(
    ("args", "message"),
    [({"temperature": -1.0}, "temperature.*-1"), ({"top_k": 0}, "top_k.*0"), ({"top_p": 2.0}, r"top_p.*2\.0")],
)
def test_impossible_settings_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.randn(5), **args)


@pytest.mark.parametrize("top_k", [None, 5, 40])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
def test_probabilities_are_those_of_transformers(top_k, top_p, min_p):
    logits = 3 * torch.randn(6, 40)
    expected = logits / 0.7
    for warper in (TopKLogitsWarper(top_k or 40), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        expected = warper(None, expected)
    found = probabilities(logits, Sampling(0.7, top_k, top_p, min_p))
    torch.testing.assert_close(found, expected.softmax(-1))
    greedy = probabilities(logits, Sampling(temperature=0.0, min_p=min_p))
    assert torch.equal(greedy, torch.nn.functional.one_hot(logits.argmax(-1), 40).float())


def test_penalties_and_bias_are_as_defined():
    prompt, output, generator = [3, 1, 4, 1], [5, 9, 5, 5, 1], torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator)
    repeated = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits[None].clone())[0]
    sampling = Sampling(
        repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={2: -math.inf, 5: 1.5}
    )
    expected = repeated.tolist()
    for token in range(12):
        count = output.count(token)
        expected[token] += {2: -math.inf, 5: 1.5}.get(token, 0.0) - 0.2 * count - 0.3 * (count > 0)
    before = logits.clone()
    for dtype in (torch.float32, torch.float64):
        found = sampling.adjust(logits.to(dtype), prompt + output, len(prompt))
        torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(logits, before)
    first = Sampling(presence_penalty=1.0, frequency_penalty=1.0).adjust(logits, prompt, len(prompt))
    assert torch.equal(first, logits)  # nothing is output yet


def test_processors_come_last_and_see_the_tokens_so_far():
    seen = []

    def process(tokens, logits):
        seen.append((list(tokens), logits.dtype, logits[7].item()))
        return torch.full_like(logits, -math.inf).index_fill_(0, torch.tensor([6]), 0.0)

    sampling = Sampling(logit_bias={7: 100.0}, processors=(process,))
    row = row_of(sampling, [1, 2])
    row.tokens.append(3)
    assert draw(torch.zeros(1, 9, dtype=torch.bfloat16), [row]).tolist() == [6]
    assert seen == [([1, 2, 3], torch.float32, 100.0)]


class Alternate:
    """Allows its two tokens in turn, and remembers whose turn it is."""

    turn = 0

    def __call__(self, tokens, logits):
        self.turn += 1
        return torch.full_like(logits, -math.inf).index_fill_(0, torch.tensor([5 + self.turn % 2]), 0.0)


def test_processors_keep_what_they_know_about_one_sequence():
    sampling = Sampling(processors=(Alternate(),))
    rows = [row_of(sampling) for _ in range(2)]
    assert [draw(torch.zeros(1, 9), [rows[0]]).item() for _ in range(3)] == [6, 5, 6]
    assert draw(torch.zeros(2, 9), rows).tolist() == [5, 6]
    assert sampling.processors[0].turn == 0


def test_pick_inverts_the_distribution():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0])
    for random_draw, index in [(0.0, 1), (0.12, 1), (0.13, 3), (0.49, 3), (0.51, 4), (1 - 2**-32, 4)]:
        assert pick(weights[None], torch.tensor([random_draw], dtype=torch.float64)).item() == index
    random_draws = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    counts = torch.bincount(pick(weights.expand(800, -1), random_draws), minlength=6)
    assert counts.tolist() == [0, 100, 0, 300, 400, 0]


def test_a_seeded_row_draws_the_same_in_any_company():
    logits, steps = torch.randn(4, 50), 20
    mine = Sampling(temperature=1.3, top_k=30, seed=11)
    others = [mine, Sampling(temperature=1.3, top_k=30), Sampling(top_p=0.8, seed=3), Sampling(temperature=0.0)]

    def drawn(company):
        rows = [row_of(sampling) for sampling in company]
        return [[int(x) for x in draw(logits[[0, *range(1, len(rows))]], rows)][0] for _ in range(steps)]

    alone = drawn([mine])
    assert len(set(alone)) > 5
    for company in ([mine, others[1]], [mine, others[2], others[3]], [mine, *others[1:]], [mine, mine]):
        assert drawn(company) == alone
    twice = [row_of(mine), row_of(mine)]
    assert all(len(set(draw(logits[:1].expand(2, -1), twice).tolist())) == 1 for _ in range(steps))
    assert drawn([Sampling(temperature=1.3, top_k=30, seed=12)]) != alone


def test_rows_with_settings_of_their_own_are_drawn_by_them():
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.5, 2.5, -2.0])
    settings = [Sampling(2.0), Sampling(0.5, 3), Sampling(top_p=0.5, seed=1), Sampling(0.0), Sampling(2.0, seed=2)]
    rows = [row_of(sampling) for sampling in settings]
    drawn = torch.stack([draw(logits.expand(5, -1), rows) for _ in range(1000)], dim=1)
    for sampling, row in zip(settings, drawn, strict=True):
        share = torch.bincount(row, minlength=7) / 1000
        torch.testing.assert_close(share, probabilities(logits[None], sampling)[0], atol=0.06, rtol=0)


@pytest.mark.parametrize(
    "args",
    [
        {"temperature": float("nan")},
        {"top_p": float("nan")},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {"a": 0.0}},
        {"logit_bias": {1: float("nan")}},
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(args):
    with pytest.raises(ValueError, match=next(iter(args))):
        Sampling(**args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("broken", [[math.nan], [-math.nan], [math.inf], [-math.inf] * 4], ids=str)
@pytest.mark.parametrize("place", [0, 2])
def test_no_token_is_drawn_from_logits_that_are_not_finite(dtype, broken, place):
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0], [3.0, 1.0, 2.0, -1.0]], dtype=dtype)
    logits[0, (0 if len(broken) > 1 else place) :][: len(broken)] = torch.tensor(broken, dtype=dtype)
    for sampling in (Sampling(0.0), Sampling(), Sampling(top_k=4), Sampling(0.5, 3, 0.9, 0.1), Sampling(top_k=1)):
        tokens = draw_rows(logits, sampling)
        assert tokens[0] == NO_TOKEN
        assert 0 <= tokens[1] < 4  # rows are independent
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            sample(logits[:, None], sampling.temperature, sampling.top_k, sampling.top_p)


def test_a_nan_with_a_sign_is_found_among_larger_bits():
    logits = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.bfloat16)
    logits.view(torch.int16)[0, 1] = -64  # what processors give for inf - inf
    assert logits[0, 1].isnan()
    assert likeliest(logits).tolist() == [NO_TOKEN]
