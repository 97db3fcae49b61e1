"""Networks that users bring, written once over a namespace `nn`, torch.nn or fastnn, and how both are trained."""

import torch
import torch.nn.functional as F

import fastnn
from fastnn.train.data import load_digits
from fastnn.train.model import FASTNN, TORCH

BOTH = (TORCH, FASTNN)


def real_digits(count, size=28, channels=1, dtype=torch.float32):
    """Real images [count, channels, size, size] and their labels."""
    digits = load_digits()
    x = F.interpolate(digits.train_x[:count], size=(size, size), mode="bilinear", align_corners=False)
    return x.repeat(1, channels, 1, 1).to(dtype), digits.train_y[:count]


def build(network, dtype=torch.float32):
    """The network from torch.nn and from fastnn, with the same weights, which the same seed gives."""
    models = []
    for library in BOTH:
        torch.manual_seed(1)
        models.append(network(library.nn).to(dtype))
    for a, b in zip(*(m.state_dict().items() for m in models), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
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


class ByHand(torch.nn.Module):
    """Three layers: sigmoid, sigmoid, identity."""

    def __init__(self, nn):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.l3(torch.sigmoid(self.l2(torch.sigmoid(self.l1(x)))))


class Diabetes(torch.nn.Module):
    """8-6-4-1 with relu, relu and a sigmoid."""

    def __init__(self, nn):
        super().__init__()
        self.linear1, self.linear2, self.linear3 = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 1)
        self.relu, self.sigmoid = nn.ReLU(), torch.nn.Sigmoid()

    def forward(self, x):
        x = self.relu(self.linear1(x))
        return self.sigmoid(self.linear3(self.relu(self.linear2(x))))


class MnistMlp(torch.nn.Module):
    """784-512-256-128-64-10 on flattened images."""

    def __init__(self, nn):
        super().__init__()
        sizes = (784, 512, 256, 128, 64, 10)
        self.layers = torch.nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.relu = fastnn.functional.relu if nn is fastnn else F.relu

    def forward(self, x):
        x = x.view(-1, 784)
        for layer in self.layers[:-1]:
            x = self.relu(layer(x))
        return self.layers[-1](x)


def cifar10_cnn(nn):
    """Three 5x5 convolutions with pooling and two linear layers, no activations; 3x32x32 in."""
    return torch.nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(2), nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), torch.nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10),
    )  # fmt: skip


class SharedLayers(torch.nn.Module):
    """One pooling layer and one in-place ReLU, each used several times; 3x25x25 in."""

    def __init__(self, nn):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool, self.relu = nn.MaxPool2d(2, 2), nn.ReLU(inplace=True)
        self.fc1, self.fc2, self.fc3 = nn.Linear(144, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = x.view(-1, 144)
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))


class ResidualBlock(torch.nn.Module):
    """A small residual network: convolution, batch norm, in-place ReLU, a shortcut, global average pooling."""

    def __init__(self, nn):
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
