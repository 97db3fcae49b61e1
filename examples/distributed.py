"""Data-parallel training on the CPU: torchrun --standalone --nproc-per-node 2 examples/distributed.py

Every process trains the MNIST CNN on its half of the digits; DDP (or FSDP, with --fsdp) averages the gradients over
gloo. The model is plain torch.nn and fastnn.convert() is the only line of fastnn.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastnn
from fastnn.train.data import load_digits


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 10),
    )  # fmt: skip


def shard(count):
    """This process's part of the first `count` digits and labels."""
    digits = load_digits()
    mine = slice(dist.get_rank(), count, dist.get_world_size())
    return digits.train_x[mine], digits.train_y[mine]


def train(model, steps, batch=32):
    """Trains for some steps on this process's digits; returns the losses."""
    x, y = shard(batch * steps * dist.get_world_size())
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), nn.CrossEntropyLoss()
    losses = []
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fsdp", action="store_true", help="shard parameters and optimizer state as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one core a process
    dist.init_process_group("gloo")
    model = fastnn.convert(network())
    model = fully_shard(model) if arguments.fsdp else DistributedDataParallel(model)
    losses = train(model, arguments.steps)
    print(f"process {dist.get_rank()}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    dist.barrier()
    del model  # before the group: gloo's threads may wait for Python while Python waits for them
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
