"""Ten steps on two weights, by hand: every optimizer's result to the last published digit."""

import pytest
import torch

import fastnn

EXPECTED = {
    "Adam": ({"eps": 1e-6}, [0.90076026500025, -1.900154376412423], 1e-14),
    "Yogi": ({}, [0.9009797360, -1.9002704077], 1e-10),
    "SGD": ({"momentum": 0.9}, [0.6535598806, 0.4904155039], 1e-10),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_ten_steps(name):
    kwargs, expected, tolerance = EXPECTED[name]
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    optimizer = getattr(fastnn.optim, name)([w], lr=0.01, **kwargs)
    for _ in range(10):
        optimizer.zero_grad()
        (w * x - 0.5).square().sum().backward()
        optimizer.step()
    assert (w.detach() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= tolerance
    assert fastnn.fallbacks() == {}
