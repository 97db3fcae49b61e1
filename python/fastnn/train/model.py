"""The MNIST CNN, written once and built from either library's layers."""

from dataclasses import dataclass
from types import ModuleType

import torch

import fastnn


@dataclass(frozen=True)
class Library:
    """Where layers and optimizers come from."""

    name: str
    nn: ModuleType
    optim: ModuleType


TORCH = Library("torch.nn", torch.nn, torch.optim)
FASTNN = Library("fastnn", fastnn, fastnn.optim)


class MnistCnn(torch.nn.Module):
    """Two convolutions, one pooling layer used twice, one linear layer: 8,490 parameters.

    Takes images [N, 1, 28, 28] and returns logits [N, 10].
    """

    def __init__(self, nn):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(320, 10)

    def forward(self, x):
        x = self.relu(self.pool(self.conv1(x)))
        x = self.relu(self.pool(self.conv2(x)))
        return self.fc(x.view(x.size(0), -1))


OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.01, "momentum": 0.5}),
    "adam": ("Adam", {"lr": 0.001}),
    "adamw": ("AdamW", {"lr": 0.001}),
    "adagrad": ("Adagrad", {"lr": 0.01}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
    "rmsprop": ("RMSprop", {"lr": 0.001}),
}


def make_optimizer(library, name, parameters, lr=None):
    """The library's optimizer with the job's default settings; `lr` replaces the default learning rate."""
    cls, options = OPTIMIZERS[name]
    return getattr(library.optim, cls)(parameters, **(options if lr is None else {**options, "lr": lr}))
