"""Classifiers of small images: an MLP, the MNIST CNN, LeNet-5, the CIFAR10 CNN, shared layers, and a diabetes MLP."""

import numpy as np
import torch
import torch.nn.functional as F
from common import batches, digits, show, train
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Diabetes(nn.Module):
    """8-6-4-1 with relu, relu and a sigmoid."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2, self.linear3 = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 1)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        x = self.relu(self.linear1(x))
        return self.sigmoid(self.linear3(self.relu(self.linear2(x))))


class MnistMlp(nn.Module):
    """784-512-256-128-64-10 on flattened images."""

    def __init__(self):
        super().__init__()
        sizes = (784, 512, 256, 128, 64, 10)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x):
        x = x.view(-1, 784)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MnistCnn(nn.Module):
    """Two 5x5 convolutions, one pooling object used twice, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, kernel_size=5), nn.Conv2d(10, 20, kernel_size=5)
        self.pooling, self.fc = nn.MaxPool2d(2), nn.Linear(320, 10)

    def forward(self, x):
        batch = x.size(0)
        x = F.relu(self.pooling(self.conv1(x)))
        x = F.relu(self.pooling(self.conv2(x)))
        return self.fc(x.view(batch, -1))


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Sigmoid(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(),
        nn.Linear(84, 10),
    )  # fmt: skip


def cifar10_cnn():
    """Three 5x5 convolutions with pooling and two linear layers, no activations; 3x32x32 in."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(2), nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10),
    )  # fmt: skip


class SharedLayers(nn.Module):
    """One pooling layer and one in-place ReLU, each used several times; 3x25x25 in."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool, self.relu = nn.MaxPool2d(2, 2), nn.ReLU(inplace=True)
        self.fc1, self.fc2, self.fc3 = nn.Linear(144, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = x.view(-1, 144)
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))


def large_images():
    """Any image size: adaptive pooling ends in one pixel; 54,273 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.Dropout2d(0.1), nn.AdaptiveMaxPool2d(1),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid(),
    )  # fmt: skip


def diabetes_table():
    features, target = load_diabetes(return_X_y=True)
    table = np.c_[10 * features[:, :8], target > 140].astype(np.float32)
    return torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, [-1]])  # not contiguous


def diabetes(prepare):
    model = prepare(Diabetes())
    order = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*diabetes_table()), 32, shuffle=True, num_workers=2, generator=order)
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.BCELoss(), loader)


def classifier(network, lr, count=256, batch=32, momentum=0.5, **images):
    def system(prepare):
        model = prepare(network())
        model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # not reassigned
        device = next(model.parameters()).device
        data = [(x.to(device), y.to(device)) for x, y in batches(*digits(count, **images), batch)]
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        return train(model, optimizer, nn.CrossEntropyLoss(), data)

    return system


def large(prepare):
    model = prepare(large_images())
    x, y = digits(4, size=512, channels=3)
    data = [(x, (y > 4).float()[:, None])] * 2
    return train(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.BCELoss(), data)


SYSTEMS = {
    "diabetes MLP": diabetes, "MNIST MLP": classifier(MnistMlp, 0.01, batch=64),
    "MNIST CNN": classifier(MnistCnn, 0.01, batch=64),
    "LeNet-5": classifier(lenet, 0.5), "CIFAR10 CNN": classifier(cifar10_cnn, 0.01, 96, 16, size=32, channels=3),
    "shared layers": classifier(SharedLayers, 0.001, 80, 8, 0.9, size=25, channels=3), "512 x 512 images": large,
}  # fmt: skip

if __name__ == "__main__":
    show(SYSTEMS)
