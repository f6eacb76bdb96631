"""Products of matrices as they lie in memory, against products in float64."""

import pytest
import torch

from litgpt.kernels import matrices
from litgpt.kernels.library import library
from litgpt.kernels.matrices import product

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")


def drawn(rows, columns, turned):
    x = torch.randn(columns, rows).T if turned else torch.randn(rows, columns)
    return x.bfloat16()


@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 32, 64), (7, 33, 65), (100, 17, 1), (2100, 70, 66), (5, 1, 3), (50, 96, 200), (40, 4133, 70)]
)
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
def test_products_are_exact(M, K, N, turned):
    torch.manual_seed(0)
    a, b, bias = drawn(M, K, turned[0]), drawn(K, N, turned[1]), torch.randn(N).bfloat16()
    for added in (bias, None):
        y, expected = matrices.multiply(a, b, added), a.double() @ b.double() + (0 if added is None else added.double())
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5 * expected.abs().max().item())
    before, place = drawn(M, N, False), torch.empty(M * N + 1).bfloat16()[1:].view(M, N)
    place.copy_(before)
    assert matrices.multiply(a, b, to=place, adds=True) is place
    expected = a.double() @ b.double() + before.double()
    torch.testing.assert_close(place.double(), expected, rtol=2**-8, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(matrices.multiply(a, b, to=place), matrices.multiply(a, b))


def test_rows_may_lie_apart():
    a, b = torch.randn(40, 64).bfloat16()[:, 8:40], torch.randn(32, 100).bfloat16()[:, 20:90]
    expected = a.double() @ b.double()
    torch.testing.assert_close(matrices.multiply(a, b).double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_float32_products_are_added_in_parts(monkeypatch, onednn, adds):
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(matrices, "PART_BYTES", 3 * 4 * 20)  # three rows
    d, x, before = torch.randn(40, 50), torch.randn(40, 20), torch.randn(50, 20)
    place = before.clone()
    assert matrices.add_product(place, d.T, x, adds=adds) is place
    expected = d.T.double() @ x.double() + adds * before.double()
    torch.testing.assert_close(place.double(), expected, rtol=1e-5, atol=1e-4)


def test_what_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(matrices, "are_faster", lambda: True)
    a, b = torch.randn(40, 32).bfloat16(), torch.randn(32, 48).bfloat16()
    assert matrices.can_multiply(a, b)
    assert not matrices.can_multiply(a[:4], b)
    assert not matrices.can_multiply(a, b.float())
    assert not matrices.can_multiply(a.float(), b.float())
    assert not matrices.can_multiply(a[:, :1].expand(40, 32), b[:, ::2])
    torch.testing.assert_close(product(a, b), a @ b, rtol=2**-7, atol=1e-2)
