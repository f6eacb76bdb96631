import itertools

import pytest
import torch
from tiny import tiny_gpt

from litgpt.engine.caches import prepare_caches
from litgpt.engine.drafting import DraftModel, PromptLookup
from litgpt.engine.drawing import draw_from
from litgpt.engine.engine import Engine, decode
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.engine.verification import verify_token

GRID = [(i + 0.5) / 40 for i in range(40)]


class RandomDraws(Sequence):
    """A row whose random numbers are given, and counted."""

    def give(self, *numbers):
        self.numbers, self.used = iter(numbers), 0
        return self

    def uniform(self):
        self.used += 1
        return next(self.numbers)


def distributions(kind):
    generator = torch.Generator().manual_seed(5)
    p, q = torch.rand(2, 6, generator=generator)
    if kind == "apart":
        p[:2], q[2:4] = 0, 0
    elif kind == "equal":
        q = p
    elif kind == "one-hot target":
        p = torch.tensor([0.0, 0, 0, 1, 0, 0])
    elif kind == "one-hot draft":
        q = torch.tensor([0.0, 0, 1, 0, 0, 0])
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("kind", ["near", "apart", "equal", "one-hot target", "one-hot draft"])
def test_tokens_drawn_with_a_draft_have_the_targets_distribution_over_all_random_draws(kind):
    """Every draft token, weighted by q, with every pair of random draws on a grid: the result has distribution p, and draft tokens are accepted as often as possible."""
    p, q = distributions(kind)
    drawn, accepted = torch.zeros(6), 0.0
    for draft_token in range(6):
        for first in GRID:
            row = RandomDraws(torch.tensor([0]), 9)
            token = verify_token(p.log(), draft_token, q, row.give(first, 0.5))
            if row.used == 1:
                assert token == draft_token
                drawn[draft_token] += q[draft_token] / len(GRID)
                accepted += q[draft_token].item() / len(GRID)
                continue
            for second in GRID:
                again = verify_token(p.log(), draft_token, q, row.give(first, second))
                assert again != draft_token or q[draft_token] == 0
                drawn[again] += q[draft_token] / len(GRID) ** 2
    assert torch.allclose(drawn, p, atol=0.03)
    assert accepted == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.03)  # no rule accepts more


def test_a_certain_draft_token_leaves_the_draw_as_it_is():
    logits = torch.randn(50)
    for seed in range(100):
        plain, beside = (Sequence(torch.tensor([0]), 9, Sampling(top_k=10, seed=seed)) for _ in range(2))
        tokens = {
            verify_token(logits, draft_token, None, row) for draft_token, row in ((3, plain), (seed % 50, beside))
        }
        assert len(tokens) == 1
        assert plain.uniform() == beside.uniform()


def test_equal_distributions_that_differ_by_rounding_only_give_a_token():
    p = torch.tensor([0.25, 0.75])
    row = RandomDraws(torch.tensor([0]), 9).give(1 - 2**-32, 0.5)
    assert verify_token(p.log(), 1, torch.tensor([0.25, 1.0]), row) in (0, 1)
    assert draw_from(torch.tensor([0.0, 0.0, 1.0]), RandomDraws(torch.tensor([0]), 9).give(0.0)) == 2


# --- all of it, over many draws

SETTINGS = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(temperature=1.3, top_k=3),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.2),
    "penalties": Sampling(frequency_penalty=1.5, repetition_penalty=1.3),
}
NEW, ROUNDS, BATCH = 3, 15, 100


def expected(model, prompt, setting):
    """The probability of every sequence of new tokens, from full forwards and formulas written out."""
    sequences = {}
    for new in itertools.product(range(4), repeat=NEW):
        probability = 1.0
        for i in range(NEW):
            so_far = [*prompt.tolist(), *new[:i]]
            logits = model(torch.tensor([so_far]))[0, -1].double()
            for token in range(4):
                if setting.repetition_penalty != 1 and token in so_far:
                    factor = setting.repetition_penalty
                    logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
                logits[token] -= setting.frequency_penalty * new[:i].count(token)
            order = logits.argsort(descending=True).tolist()
            allowed = set(order[: setting.top_k])
            probs = (logits / setting.temperature).exp()
            probs[[t for t in range(4) if t not in allowed]] = 0
            probs /= probs.sum()
            nucleus, mass = set(), 0.0
            for token in order:
                if mass < setting.top_p:
                    nucleus.add(token)
                mass += probs[token].item()
            least = setting.min_p * probs.max()
            probs[[t for t in range(4) if t not in nucleus or probs[t] < least]] = 0
            probability *= (probs / probs.sum())[new[i]].item()
        sequences[new] = probability
    return sequences


def chance_of_a_worse_fit(counts, probabilities):
    """The p-value of Pearson's test; rare outcomes are one cell."""
    total = sum(counts.values())
    assert all(probabilities[new] > 0 for new in counts), "a sequence that cannot be"
    common = [new for new, p in probabilities.items() if p * total >= 5]
    cells = [(counts.get(new, 0), probabilities[new] * total) for new in common]
    rest = total - sum(count for count, _ in cells), total - sum(mean for _, mean in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafter", ["draft", "lookup"])
def test_sampled_output_has_the_targets_distribution(drafter, setting):
    vocabulary = {"vocab_size": 4, "padded_vocab_size": 4}
    target, draft = tiny_gpt(**vocabulary), tiny_gpt(**vocabulary)
    for model in (target, draft):
        model.lm_head.weight.data *= 0.25  # nothing certain, and yet not alike
    prompt = torch.tensor([0, 1, 2, 3, 0, 1])
    probabilities = expected(target, prompt, SETTINGS[setting])
    counts, drafted, accepted = {}, 0, 0
    for _ in range(ROUNDS):
        sequences = [Sequence(prompt, NEW, SETTINGS[setting]) for _ in range(BATCH)]
        drafting = DraftModel(draft, 4, 2) if drafter == "draft" else PromptLookup(2, min_ngram=1)
        engine = Engine(target, drafter=drafting)
        prepare_caches(target, BATCH, len(prompt) + NEW)
        for _ in decode(engine, sequences):
            pass
        for sequence in sequences:
            counts[tuple(sequence.new_tokens)] = counts.get(tuple(sequence.new_tokens), 0) + 1
        drafted, accepted = drafted + engine.n_drafted, accepted + engine.n_accepted
    assert 0.1 < accepted / drafted < 0.95
    assert chance_of_a_worse_fit(counts, probabilities) > 0.001
