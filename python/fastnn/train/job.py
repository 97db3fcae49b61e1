"""Trains the MNIST CNN with torch.nn and with fastnn on the same batches, step by step in turn, and times each step."""

import statistics
import time
from dataclasses import dataclass, field

import torch

from fastnn.info import fallbacks
from fastnn.train.model import FASTNN, TORCH, Library, MnistCnn, make_optimizer


@dataclass
class Side:
    """One library's half of the job: its model, and the loss and seconds of every step so far."""

    library: Library
    model: torch.nn.Module
    criterion: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    accuracy: float = float("nan")

    def step(self, x, y):
        """One training step on images x [N, 1, 28, 28] and labels y [N]."""
        synchronize(x.device)
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        synchronize(x.device)
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())

    def test(self, x, y, batch_size):
        """Sets `accuracy`, the share of images whose largest logit is their label's."""
        self.model.eval()
        with torch.no_grad():
            right = sum(
                (self.model(xs).argmax(1) == ys).sum().item()
                for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True)
            )
        self.accuracy = right / len(y)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_sides(optimizer="sgd", lr=None, seed=0, device="cpu", dtype=torch.float32):
    """Both halves, with the same weights."""
    sides = []
    for library in (TORCH, FASTNN):
        torch.manual_seed(seed)
        model = MnistCnn(library.nn)
        model.to(device, dtype)
        parameters = make_optimizer(library, optimizer, model.parameters(), lr)
        sides.append(Side(library, model, library.nn.CrossEntropyLoss(), parameters))
    return sides


def batches(data, batch_size, seed):
    """One epoch of batches in the order the seed gives; the last one may be smaller."""
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed)).to(data.train_x.device)
    for indices in order.split(batch_size):
        yield data.train_x[indices], data.train_y[indices]


@dataclass(frozen=True)
class Result:
    """What the job found: both sides after training and testing, and torch's time over fastnn's, step by step."""

    torch: Side
    fastnn: Side
    steps_per_epoch: int
    ratio: float
    p20: float
    p80: float
    fallbacks: dict

    def sides(self):
        return self.torch, self.fastnn

    def loss(self, side):
        """The mean training loss of the last epoch."""
        return statistics.fmean(side.losses[-self.steps_per_epoch :])


def train(data, epochs, batch_size=64, optimizer="sgd", lr=None, seed=0, progress=lambda sides, epoch: None):
    """Trains both sides on `data` and tests them.

    Args:
        data: Digits, on the device and in the dtype to train in.
        progress: called after every step with both sides and the epoch, counted from 0.
    """
    x = data.train_x
    sides = make_sides(optimizer, lr, seed, x.device, x.dtype)
    fallbacks(clear=True)
    for epoch in range(epochs):
        for xs, ys in batches(data, batch_size, seed + epoch):
            turn = sides if len(sides[0].losses) % 2 == 0 else sides[::-1]  # A B B A: neither always goes first
            for side in turn:
                side.step(xs, ys)
            progress(sides, epoch)
    for side in sides:
        side.test(data.test_x, data.test_y, batch_size)
    ratios = sorted(a / b for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True))
    return Result(
        *sides,
        steps_per_epoch=-(-len(x) // batch_size),
        ratio=statistics.median(ratios),
        p20=ratios[int(0.2 * (len(ratios) - 1))],
        p80=ratios[int(0.8 * (len(ratios) - 1))],
        fallbacks=fallbacks(),
    )
