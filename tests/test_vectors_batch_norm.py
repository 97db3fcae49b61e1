"""Published figures: batch norm by hand."""

import pytest
import torch

import fastnn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_of_three_rows(dtype):
    bn = fastnn.BatchNorm1d(2, dtype=dtype)
    y = bn(torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=dtype))
    column = torch.tensor([-1.2247425750, 0, 1.2247425750], dtype=dtype)
    torch.testing.assert_close(y, column[:, None].expand(3, 2), rtol=1e-6 if dtype == torch.float32 else 1e-8, atol=0)
    torch.testing.assert_close(bn.running_mean, torch.tensor([0.3, 0.4], dtype=dtype))
    torch.testing.assert_close(bn.running_var, torch.tensor([1.3, 1.3], dtype=dtype))


def test_a_bias_before_batch_norm_cancels():
    x = torch.randn(8, 4, 6, 6)
    bn = fastnn.BatchNorm2d(4)
    torch.testing.assert_close(bn(x), bn(x + torch.randn(4, 1, 1)), rtol=1e-5, atol=1e-5)
