"""What the examples share: data that needs no download, one training loop, and the comparison they print."""

import time

import torch
import torch.nn.functional as F

import fastnn
from fastnn.train.data import load_digits


def digits(count, size=28, channels=1):
    """Real handwritten digits [count, channels, size, size] and their labels."""
    data = load_digits()
    x = F.interpolate(data.train_x[:count], size=(size, size), mode="bilinear", align_corners=False)
    return x.repeat(1, channels, 1, 1), data.train_y[:count]


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def train(model, optimizer, criterion, data):
    """One pass over the batches; the loss of every step."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show(systems):
    """Trains every system with torch.nn and with fastnn from the same seed and prints first and last losses.

    Args:
        systems: name -> function of `prepare`, which it applies to each model it has built; returns the losses.
    """
    for name, system in systems.items():
        for label, prepare in (("torch.nn", lambda model: model), ("fastnn", fastnn.convert)):
            torch.manual_seed(0)
            start = time.perf_counter()
            losses = system(prepare)
            seconds = time.perf_counter() - start
            print(f"{name:28} {label:9} loss {losses[0]:.6f} -> {losses[-1]:.6f}   {seconds:.2f} s")
