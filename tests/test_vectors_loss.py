"""Published figures for softmax and cross-entropy."""

import pytest
import torch

import fastnn


def test_softmax_of_large_logits():
    y = fastnn.functional.softmax(torch.tensor([1010.0, 1000.0, 990.0], dtype=torch.float64), 0)
    expected = torch.tensor([9.99954600e-01, 4.53978686e-05, 2.06106005e-09], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=0)


def test_one_row():
    x = torch.tensor([[0.2, 0.1, -0.1]], dtype=torch.float64, requires_grad=True)
    loss = fastnn.functional.cross_entropy(x, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.9729189131256584, rel=1e-14)
    torch.testing.assert_close(x.grad, torch.tensor([[-0.6220, 0.3420, 0.2800]]).double(), rtol=0, atol=5e-5)


def test_three_rows():
    x = torch.tensor([[0.1, 0.2, 0.9], [1.1, 0.1, 0.2], [0.2, 2.1, 0.1]])
    rows = fastnn.functional.cross_entropy(x, torch.tensor([2, 0, 1]), reduction="none")
    torch.testing.assert_close(rows, torch.tensor([0.665732, 0.573490, 0.250684]), rtol=0, atol=5e-7)
    assert fastnn.CrossEntropyLoss()(x, torch.tensor([2, 0, 1])).item() == pytest.approx(0.4966, abs=5e-5)


@pytest.mark.parametrize(
    ("x", "target", "expected"),
    [
        ([[0.8, 0.2, 0.3], [0.2, 0.3, 0.5], [0.2, 0.2, 0.5]], [2, 0, 1], 1.2389),
        ([[2.0, 1.0, 0.1]], [0], 0.417030),
    ],
)
def test_cross_entropy_is_nll_of_log_softmax(x, target, expected):
    x, target = torch.tensor(x), torch.tensor(target)
    F = fastnn.functional
    assert F.cross_entropy(x, target).item() == pytest.approx(expected, abs=5e-5)
    assert F.nll_loss(F.log_softmax(x, 1), target).item() == pytest.approx(expected, abs=5e-5)
