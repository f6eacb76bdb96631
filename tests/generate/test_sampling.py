import pytest
import torch

from litgpt.generate.sampling import batched_sample, sample, sample_top_p

DRAWS = 20_000


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
    drawn = sample(logits.expand(DRAWS, 1, -1), temperature, top_k, top_p)
    share = torch.bincount(drawn, minlength=len(logits)) / DRAWS
    expected = expected_distribution(logits, temperature, top_k, top_p)
    torch.testing.assert_close(share, expected, atol=0.02, rtol=0)
    assert (share[expected == 0] == 0).all()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(50, 33)
    assert torch.equal(sample(logits[:, None], temperature=0.0, top_p=0.3), logits.argmax(-1))


@pytest.mark.parametrize(("shape", "result"), [((7,), (1,)), ((3, 7), (1,)), ((1, 3, 7), (1,)), ((2, 3, 7), (2,))])
def test_sample_reads_the_last_position(shape, result):
    logits = torch.randn(shape)
    token = sample(logits, temperature=0.0)
    assert token.shape == result
    assert token.dtype == torch.int64
    last = logits if logits.ndim == 1 else logits[..., -1, :]
    assert torch.equal(token, last.reshape(-1, 7).argmax(-1))


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
