"""Attention of rows, with gradients, against attention written out in float64."""

import math

import pytest
import torch
from tiny import tiny_gpt

from litgpt.kernels.library import library
from litgpt.kernels.row_attention import Seen, attend_rows, can_attend_rows
from litgpt.train.model import TrainingModel

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")


def written_out(query, keys, values, sizes, scale):
    H, G = query.shape[1], keys.shape[1]
    outputs = []
    for q, k, v in zip(*(x.double().split(sizes, dim=2) for x in (query, keys, values)), strict=True):
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.mT * scale).masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append((weights @ v).transpose(1, 2).flatten(2))
    return torch.cat(outputs, dim=1)


def parts_of(qkv, H, G, D):
    """Queries, keys and values as the model has them: views of one tensor (1, N, (H + 2 G) D)."""
    heads = qkv.view(1, -1, H + 2 * G, D).transpose(1, 2)
    return heads.split_with_sizes((H, G, G), dim=1)


@pytest.mark.parametrize(("H", "G", "D"), [(9, 3, 64), (4, 4, 16), (6, 1, 80), (2, 1, 128)])
@pytest.mark.parametrize("sizes", [[1], [5, 1, 17], [64, 65, 3], [200], [130, 16, 1, 1, 33]])
def test_outputs_and_gradients_are_exact(H, G, D, sizes):
    torch.manual_seed(0)
    qkv = (2 * torch.randn(1, sum(sizes), (H + 2 * G) * D)).requires_grad_()
    d_y = torch.randn(1, sum(sizes), H * D)
    inputs = parts_of(qkv, H, G, D)
    assert can_attend_rows(*inputs)
    y = attend_rows(*inputs, sizes, D**-0.5)
    expected = written_out(*inputs, sizes, D**-0.5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=3e-5)
    (own,), (exact,) = torch.autograd.grad(y, qkv, d_y), torch.autograd.grad(expected, qkv, d_y.double())
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("H", "G", "D"), [(6, 2, 64), (2, 2, 16), (3, 1, 80)])
@pytest.mark.parametrize("sizes", [[1], [5, 1, 17], [64, 65, 3], [193, 191]])
def test_in_bfloat16_errors_are_those_of_rounding(H, G, D, sizes):
    torch.manual_seed(0)
    qkv = (2 * torch.randn(1, sum(sizes), (H + 2 * G) * D)).bfloat16().requires_grad_()
    exact, d_y = qkv.detach().double().requires_grad_(), torch.randn(1, sum(sizes), H * D).bfloat16()
    y = attend_rows(*parts_of(qkv, H, G, D), sizes, D**-0.5)
    expected = written_out(*parts_of(exact, H, G, D), sizes, D**-0.5)
    (own,), (wanted,) = torch.autograd.grad(y, qkv, d_y), torch.autograd.grad(expected, exact, d_y.double())
    assert y.dtype == own.dtype == torch.bfloat16
    for found, right in [(y, expected), *zip(parts_of(own, H, G, D), parts_of(wanted, H, G, D), strict=True)]:
        for h in range(right.shape[1] if right.ndim == 4 else 1):
            ours, its = (found[:, h], right[:, h]) if right.ndim == 4 else (found, right)
            assert (ours.double() - its).norm() <= 8e-3 * its.norm() + 1e-5


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(("T", "before"), [(1, 40), (70, 1), (100, 333), (45, 0), (200, 100)])
@pytest.mark.parametrize("seen", [Seen(), Seen(window=50), Seen(window=90, n_sink=4), Seen(window=3, n_sink=150)])
def test_tokens_see_what_is_before_them(dtype, error, T, before, seen):
    torch.manual_seed(0)
    H, G, D, N = 4, 2, 32, before + T
    q, k, v = (2 * torch.randn(1, n, heads * D) for n, heads in ((T, H), (N, G), (N, G)))
    exact = [x.to(dtype).double().view(1, -1, x.shape[2] // D, D).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    d_y = torch.randn(1, T, H * D).to(dtype)
    position, keys = before + torch.arange(T)[:, None], torch.arange(N)
    visible = (keys <= position) & ((keys > position - seen.window) | (keys < seen.n_sink))
    query, *others = exact
    key, value = (x.repeat_interleave(H // G, dim=1) for x in others)
    weights = (query @ key.mT * 0.2).masked_fill(~visible, -math.inf).softmax(-1)
    expected = (weights @ value).transpose(1, 2).flatten(2)
    y = attend_rows(*inputs, [T], 0.2, seen)
    found = [y, *torch.autograd.grad(y, inputs, d_y)]
    for own, right in zip(found, [expected, *torch.autograd.grad(expected, exact, d_y.double())], strict=True):
        assert (own.double() - right).norm() <= error * right.norm() + 1e-5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("T", "before"), [(40, 0), (70, 300)])
def test_in_float32_a_mask_hides_keys(groups, T, before):
    torch.manual_seed(0)
    H, G, D, N = 4, 2, 32, before + T
    query, keys, values = (torch.randn(1, heads, n, D).requires_grad_() for heads, n in ((H, T), (G, N), (G, N)))
    mask = torch.rand(groups, T, N) < 0.3
    mask[:, torch.arange(T), before + torch.arange(T)] = True
    visible = (mask & (torch.arange(N) <= before + torch.arange(T)[:, None])).expand(G, -1, -1).repeat_interleave(2, 0)
    key, value = (x.double().repeat_interleave(2, dim=1) for x in (keys, values))
    weights = (query.double() @ key.mT * 0.2).masked_fill(~visible, -math.inf).softmax(-1)
    expected, d_y = (weights @ value).transpose(1, 2).flatten(2), torch.randn(1, T, H * D)
    y = attend_rows(query, keys, values, [T], 0.2, mask=mask)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = [query, keys, values]
    found, right = torch.autograd.grad(y, inputs, d_y), torch.autograd.grad(expected, inputs, d_y.double())
    for own, exact in zip(found, right, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_there_are_no_masks():
    x = torch.randn(1, 1, 4, 16).bfloat16().requires_grad_()
    with pytest.raises(ValueError, match="masks in float32 only"):
        attend_rows(x, x, x, [4], 0.2, mask=torch.ones(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(dtype):
    torch.manual_seed(0)
    qkv = (100 * torch.randn(1, 70, 48)).to(dtype).requires_grad_()
    y = attend_rows(*parts_of(qkv, 1, 1, 16), [70], 1.0)
    torch.testing.assert_close(y.double(), written_out(*parts_of(qkv, 1, 1, 16), [70], 1.0), rtol=1e-3, atol=1e-2)
    (gradient,) = torch.autograd.grad(y.sum(), qkv)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("T", [40, 80])
def test_gradients_of_outputs_need_not_be_contiguous(T):
    qkv = torch.randn(1, T, 48).requires_grad_()
    y = attend_rows(*parts_of(qkv, 1, 1, 16), [T], 1.0)
    ones = torch.ones(1, 1, 1).expand(1, T, 16)
    found, expected = (torch.autograd.grad(y, qkv, d_y, retain_graph=True)[0] for d_y in (ones, ones.contiguous()))
    assert torch.equal(found, expected)


def test_other_calls_are_left_to_torch():
    x = torch.randn(1, 2, 4, 16, requires_grad=True)
    assert can_attend_rows(x, x, x)
    assert not can_attend_rows(x.double(), x.double(), x.double())
    assert not can_attend_rows(x[..., :8], x[..., :8], x[..., :8])
    assert not can_attend_rows(*[x.expand(2, -1, -1, -1)] * 3)
    with torch.no_grad():
        assert not can_attend_rows(x, x, x)


@pytest.mark.parametrize(
    ("options", "used"),
    [({}, True), ({"sliding_window_size": 4}, True), ({"attention_logit_softcapping": 20.0}, False)],
)
def test_a_models_losses_and_gradients_stay(monkeypatch, options, used):
    found, calls = [], []
    for on in (False, True):

        def may(*inputs, on=on):
            calls.append(on and can_attend_rows(*inputs))
            return calls[-1]

        monkeypatch.setattr("litgpt.model.can_attend_rows", may)
        torch.manual_seed(0)
        model = tiny_gpt(n_embd=64, n_head=4, n_query_groups=2, **options).requires_grad_(True)
        ids = torch.randint(0, 100, (1, 40))
        loss = TrainingModel(model)(ids, ids, [7, 32, 1])
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    assert any(calls) == used
    for plain, ours in zip(*found, strict=True):
        assert (ours - plain).norm() <= 1e-4 * plain.norm()
