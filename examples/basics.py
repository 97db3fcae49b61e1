"""Regression by one linear layer, three layers by hand, and batch and layer norm written out."""

import torch
from common import show, train
from torch import nn


class ByHand(nn.Module):
    """Three layers: sigmoid, sigmoid, identity."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.l3(torch.sigmoid(self.l2(torch.sigmoid(self.l1(x)))))


class BatchNormByHand(nn.Module):
    """The biased variance normalises; the unbiased one goes to running_var."""

    def __init__(self, features, momentum=0.1, eps=1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.momentum, self.eps = momentum, eps

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(0, unbiased=True), self.momentum)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class LayerNormByHand(nn.Module):
    def __init__(self, features, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features)), eps

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def three_layers(prepare):
    model = prepare(ByHand())
    data = [(torch.tensor([[1.0, 0.5], [0.2, 0.9]]), torch.tensor([[0.3, 0.7], [0.6, 0.1]]))] * 50
    return train(model, torch.optim.SGD(model.parameters(), lr=0.5), nn.MSELoss(), data)


def linear_regression(prepare):
    model = prepare(nn.Linear(1, 1))
    data = [(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]]))] * 100
    return train(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss(reduction="sum"), data)


def logistic_regression(prepare):
    model = prepare(nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()))
    data = [(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.0], [0.0], [1.0]]))] * 1000
    return train(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.BCELoss(reduction="sum"), data)


def norms_by_hand(prepare):
    by_hand = nn.Sequential(nn.Linear(6, 16), BatchNormByHand(16), nn.ReLU(), LayerNormByHand(16), nn.Linear(16, 3))
    layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 3))
    layers.load_state_dict(by_hand.state_dict(), strict=False)  # all but num_batches_tracked
    data = [(torch.randn(12, 6), torch.randint(3, (12,))) for _ in range(30)]
    losses = []
    for model in map(prepare, (by_hand, layers)):
        losses += train(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), data)
    return losses


SYSTEMS = {
    "three layers by hand": three_layers, "linear regression": linear_regression,
    "logistic regression": logistic_regression, "norms by hand": norms_by_hand,
}  # fmt: skip

if __name__ == "__main__":
    show(SYSTEMS)
