"""One training step of whole networks, fastnn against torch, interleaved: python benches/sweep_models.py [--threads N].

Networks as every course trains them, float32, contiguous, SGD with momentum; losses of the first step are compared
before anything is timed.
"""

import torch
from sweep import parser, training_step, write_rows
from torch import nn

import fastnn
from fastnn.bench import compare
from fastnn.train.model import MnistCnn


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu1, self.relu2, self.shortcut = nn.ReLU(), nn.ReLU(), nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def mlp():
    widths = [784, 512, 256, 128, 64, 10]
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def cifar():
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(2), nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10),
    )  # fmt: skip


def resnet20():
    shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *(BasicBlock(*shape) for shape in shapes), *head)


MODELS = {
    "MNIST CNN": (lambda: MnistCnn(nn), (64, 1, 28, 28)),
    "MNIST MLP": (mlp, (64, 784)),
    "LeNet-5": (lenet, (256, 1, 28, 28)),
    "CIFAR10 CNN": (cifar, (64, 3, 32, 32)),
    "ResNet-20": (resnet20, (128, 3, 32, 32)),
}


def main():
    arguments = parser(__doc__, 4, "network")
    arguments.add_argument("--fuse", action="store_true", help="fastnn's networks with their layers joined")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, (build, shape) in MODELS.items():
        torch.manual_seed(0)
        plain = build()
        ours = fastnn.convert(plain, inplace=False)
        ours = fastnn.fuse(ours) if options.fuse else ours
        x, y = torch.randn(shape), torch.randint(10, (shape[0],))
        theirs_step = training_step(plain, nn.CrossEntropyLoss(), torch.optim.SGD(plain.parameters(), 0.01, 0.5), x, y)
        ours_step = training_step(ours, fastnn.CrossEntropyLoss(), fastnn.optim.SGD(ours.parameters(), 0.01, 0.5), x, y)
        a, b = ours_step(), theirs_step()
        assert abs(a - b) <= 1e-3 * abs(b), f"{name}: loss {a} and torch's {b}"
        ratio = compare(ours_step, theirs_step, seconds=options.seconds, min_pairs=10)
        rows.append({"model": name, "batch": shape[0], **vars(ratio)})
        print(f"{name:12s} batch {shape[0]:3d}  {ratio}", flush=True)
    write_rows(options.json, rows, threads=options.threads)


if __name__ == "__main__":
    main()
