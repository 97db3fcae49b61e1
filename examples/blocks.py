"""The blocks famous networks are made of, each in a small network: NiN, inception, residual, dense, attention."""

import torch
from common import batches, digits, show, train
from torch import nn


def conv(inputs, outputs, kernel=3, **options):
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def nin(inputs, outputs):
    """A convolution followed by two 1x1 convolutions."""
    return nn.Sequential(conv(inputs, outputs, 5), conv(outputs, outputs, 1), conv(outputs, outputs, 1))


class Inception(nn.Module):
    """Four branches, joined along the channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        quarter = outputs // 4
        self.branches = nn.ModuleList([
            conv(inputs, quarter, 1), nn.Sequential(conv(inputs, quarter, 1), conv(quarter, quarter, 3)),
            nn.Sequential(conv(inputs, quarter, 1), conv(quarter, quarter, 5)),
            nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), conv(inputs, quarter, 1)),
        ])  # fmt: skip

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.body = nn.Sequential(conv(inputs, outputs), last, nn.BatchNorm2d(outputs))
        self.shortcut, self.relu = nn.Conv2d(inputs, outputs, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.body(x)
        y += self.shortcut(x)
        return self.relu(y)


class Dense(nn.Module):
    """Each layer sees the outputs of all before it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        growth = outputs // 4
        self.layers = nn.ModuleList(conv(inputs + i * growth, growth) for i in range(4))

    def forward(self, x):
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts[1:], 1)


def depthwise_separable(inputs, outputs):
    return nn.Sequential(conv(inputs, inputs, groups=inputs), conv(inputs, outputs, 1))


class SqueezeExcitation(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = conv(inputs, outputs)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, 4, 1), nn.ReLU(), nn.Conv2d(4, outputs, 1), nn.Sigmoid()
        )

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(x)


class Cbam(nn.Module):
    """Attention over channels by one shared MLP of two poolings, then over places."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.spatial = conv(inputs, outputs), nn.Conv2d(2, 1, 7, padding=3)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(outputs, 4), nn.ReLU(), nn.Linear(4, outputs))
        self.mean, self.most = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)

    def forward(self, x):
        x = self.conv(x)
        x = x * torch.sigmoid(self.mlp(self.mean(x)) + self.mlp(self.most(x)))[..., None, None]
        places = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(places))


class Highway(nn.Module):
    """T h + (1 - T) x."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.stem, self.h, self.gate = conv(inputs, outputs), conv(outputs, outputs), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x):
        x = self.stem(x)
        t = torch.sigmoid(self.gate(x))
        return t * self.h(x) + (1 - t) * x


def system(block):
    def run(prepare):
        model = prepare(nn.Sequential(
            conv(1, 16), nn.MaxPool2d(2), block(16, 32), nn.MaxPool2d(2), block(32, 32), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(32, 10),
        ))  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return train(model, optimizer, nn.CrossEntropyLoss(), batches(*digits(192, size=16), 32))

    return run


BLOCKS = {
    "NiN": nin, "inception": Inception, "residual": Residual, "dense": Dense,
    "depthwise separable": depthwise_separable,
    "squeeze and excitation": SqueezeExcitation, "CBAM": Cbam, "highway": Highway,
}  # fmt: skip
SYSTEMS = {name: system(block) for name, block in BLOCKS.items()}

if __name__ == "__main__":
    show(SYSTEMS)
