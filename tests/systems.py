"""Networks that users bring, in torch.nn and converted to fastnn, and how both are trained."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn.train.data import load_digits
from fastnn.train.model import FASTNN, TORCH

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from basics import ByHand  # noqa: E402
from images import Diabetes, MnistMlp, SharedLayers, cifar10_cnn  # noqa: E402

__all__ = ["ByHand", "Diabetes", "MnistMlp", "SharedLayers", "cifar10_cnn"]

BOTH = (TORCH, FASTNN)


def real_digits(count, size=28, channels=1, dtype=torch.float32):
    """Real images [count, channels, size, size] and their labels."""
    digits = load_digits()
    x = F.interpolate(digits.train_x[:count], size=(size, size), mode="bilinear", align_corners=False)
    return x.repeat(1, channels, 1, 1).to(dtype), digits.train_y[:count]


def build(network, dtype=torch.float32):
    """The network in torch.nn and in fastnn, with the same weights, which the same seed gives."""
    models = []
    for prepare in (lambda model: model, fastnn.convert):
        torch.manual_seed(1)
        models.append(prepare(network().to(dtype)))
    return models


def train(models, optimizers, criteria, batches):
    """The losses of every model, [models, steps], after training each on the same batches."""
    losses = [[] for _ in models]
    for i, (model, optimizer, criterion) in enumerate(zip(models, optimizers, criteria, strict=True)):
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses[i].append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ---- the networks --------------------------------------------------------------------------------------------------


class ResidualBlock(torch.nn.Module):
    """A small residual network: convolution, batch norm, in-place ReLU, a shortcut, global average pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool, self.fc = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu(self.bn0(self.stem(x)))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.fc(self.pool(self.relu(out)).flatten(1))
