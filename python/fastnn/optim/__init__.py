"""torch.optim optimizers whose step is one call into C++."""

from fastnn.optim.adam import Adam, AdamW
from fastnn.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
