"""torch.optim optimizers whose step is one call into C++."""

from fastnn.optim.adadelta import Adadelta
from fastnn.optim.adagrad import Adagrad
from fastnn.optim.adam import Adam, AdamW
from fastnn.optim.clip_grad import clip_grad_norm_
from fastnn.optim.rmsprop import RMSprop
from fastnn.optim.sgd import SGD
from fastnn.optim.yogi import Yogi

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "RMSprop", "Yogi", "clip_grad_norm_"]
