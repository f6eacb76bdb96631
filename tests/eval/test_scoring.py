"""Log-probabilities of continuations under caches, against full forward passes."""

import random

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt

from litgpt.eval.scoring import Request, Scorer
from litgpt.eval.tree import tree_of
from litgpt.kvcache import CacheSpec


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_gpt(**VOCABULARY, block_size=256)


@pytest.fixture(scope="module")
def requests():
    """Contexts that begin alike or not, with several continuations each, and one of the longest sequence that fits."""
    draw = random.Random(0)

    def tokens(n):
        return tuple(draw.randrange(261) for _ in range(n))

    first, found = tokens(60), []
    for _ in range(8):
        context = first[: draw.choice([0, 40, 60])] + tokens(draw.randrange(1, 60))
        found += [Request(context, tokens(draw.randrange(1, 9))) for _ in range(draw.randrange(1, 4))]
    found += [Request(first[:40], tokens(3)), Request(tokens(1), tokens(256))]
    draw.shuffle(found)
    return found


def expected(model, request):
    tokens = torch.tensor(request.context + request.continuation)
    n = len(request.continuation)
    logprobs = model(tokens[None, :-1])[0].log_softmax(-1)[-n:]
    return logprobs.gather(1, tokens[-n:, None])[:, 0], bool((logprobs.argmax(-1) == tokens[-n:]).all())


def test_scores_equal_those_of_full_passes(model, requests):
    context = torch.tensor(requests[0].context)
    likeliest = Request(requests[0].context, (model(context[None])[0, -1].argmax().item(),))
    for request, score in zip([*requests, likeliest], Scorer(model).score([*requests, likeliest]), strict=True):
        logprobs, greedy = expected(model, request)
        torch.testing.assert_close(torch.tensor(score.logprobs), logprobs, atol=1e-4, rtol=1e-4)
        assert score.greedy == greedy
    assert greedy


@pytest.mark.parametrize("name", ["dense-int8", "lastrec", "h2o", "snapkv", "kvzip"])
def test_scores_under_any_cache_are_those_of_each_request_alone(model, requests, name):
    spec = CacheSpec.parse(name, None if name.startswith("dense") else 64)
    together = [score.total for score in Scorer(model, spec).score(requests[:12])]
    alone = [Scorer(model, spec).score([request])[0].total for request in requests[:12]]
    assert together == pytest.approx(alone, abs=2e-4)
    if name == "lastrec":
        dense = [score.total for score in Scorer(model).score(requests[:12])]
        assert together != pytest.approx(dense, abs=0.1)


def test_shared_prefixes_are_computed_once(model, requests, monkeypatch):
    context = requests[0].context + requests[1].context
    several = [Request((*context, i), (i, 7, last)) for i in range(3) for last in (1, 2)]
    sizes = []
    forward = type(model).forward

    def counting(self, idx, *args, **kwargs):
        sizes.append(idx.numel())
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    Scorer(model).score(several)
    assert sum(sizes) == len(context) + 3 + 6 * 2


def test_trees_hold_every_context_and_share_only_what_is_long():
    contexts = {
        (1, 2, 3): [0],
        (1, 2, 4): [1],
        tuple(range(50)): [2],
        (*range(50), 9): [3],
        tuple(range(40)): [4],
        (*range(40), 7): [5],
    }
    found = {}

    def walk(node, before):
        tokens = before + node.tokens
        found.update(dict.fromkeys(node.requests, tokens))
        for child in node.children:
            walk(child, tokens)

    roots = tree_of(contexts)
    for root in roots:
        walk(root, ())
    assert found == {i: context for context, (i,) in contexts.items()}
    assert sorted(root.tokens for root in roots) == [tuple(range(40)), (1, 2, 3), (1, 2, 4)]


def test_bad_requests_raise_before_any_work(model):
    for request in (Request((), (1,)), Request((1,), ()), Request((999,), (1,)), Request((1,) * 200, (2,) * 58)):
        with pytest.raises(ValueError, match=r"at least one token|token 999|258 tokens"):
            Scorer(model).score([request])
