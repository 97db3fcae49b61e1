"""What tests draw their random layers with."""

import torch


def choose_from(generator):
    """pick(*values): one of the values."""
    return lambda *values: values[int(torch.randint(len(values), (), generator=generator))]


def numbers_from(generator):
    """pick(low, high): a whole number from low to high."""
    return lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
