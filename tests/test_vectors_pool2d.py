"""Published pooling figures (V6), exact."""

import torch

import fastnn

X = torch.tensor([[[[3.0, 4, 6, 5], [2, 4, 6, 8], [1, 6, 7, 8], [9, 7, 4, 6]]]])


def test_v6_max_pool2d():
    y, indices = fastnn.functional.max_pool2d(X, 2, return_indices=True)
    assert y.flatten().tolist() == [4, 8, 9, 8]
    assert indices.flatten().tolist() == [1, 7, 12, 11]  # a tie goes to the first element
    x = X.clone().requires_grad_()
    fastnn.functional.max_pool2d(x, 2).sum().backward()
    assert x.grad.flatten().nonzero().flatten().tolist() == [1, 7, 11, 12]


def test_v6_avg_pool2d():
    assert fastnn.functional.avg_pool2d(X, 2).flatten().tolist() == [3.25, 6.25, 5.75, 6.25]
