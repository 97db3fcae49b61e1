"""The models that tests of fuse() try, and how a fused one is compared with the one it was made from."""

import io

import torch
import torch.nn.functional as TF
from rich.console import Console
from torch import nn

import fastnn


class Block(nn.Module):
    """A residual block with one ReLU module for both places, as torchvision writes it."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Block(16, 16, 1), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class PreActivation(nn.Module):
    """Norms before convolutions, functional ReLUs, and concatenations, called with a list."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = torch.cat(features, 1)
        x = self.conv1(TF.relu(self.norm1(x)))
        return self.conv2(TF.relu(self.norm2(x), inplace=True))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(PreActivation(8 + 4 * i, 4) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = torch.relu_(self.norm(torch.cat(features, 1)))
        return self.head(TF.adaptive_avg_pool2d(x, 1).view(x.size(0), 20))


class Inverted(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        wide = 4 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.Dropout(0.0),
        )  # fmt: skip
        self.adds = stride == 1

    def forward(self, x):
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(), Inverted(12, 1), Inverted(12, 2),
        nn.Flatten(), nn.Linear(12 * 64, 6),
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.0), nn.Linear(40, 30),
        nn.ReLU6(), nn.Linear(30, 7),
    )  # fmt: skip


class Odd(nn.Module):
    """Values used twice, a shared convolution, circular padding, groups, a broadcast addition, in-place surprises."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.shared = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))

    def forward(self, x):
        a = self.conv(x)
        b = self.bn1(a)
        c = TF.relu(b) + b  # b has two users
        d = self.bn2(self.shared(c)) + self.shift  # broadcast
        e = TF.relu(self.bn3(self.shared(TF.relu(d))))
        f = self.bn1(e)
        if torch.is_grad_enabled():
            e = 2 * e
        else:
            e.mul_(2)  # after bn1 read it, before the addition
        g = torch.relu(f + c)
        return (g * self.scale + e).mean((2, 3))


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as a library's own subclass writes it."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        torch._assert(x.ndim == 4, "images wanted")
        x = TF.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(x)


def norm_act():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), NormAct(8, nn.SiLU(inplace=True)),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), NormAct(8, nn.Hardswish()),
        nn.Conv2d(8, 4, 1), NormAct(4, nn.Identity()),
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 5), nn.SiLU(),
    )  # fmt: skip


MODELS = {"norm_act": norm_act, "resnet": resnet, "dense": Dense, "mobilenet": mobilenet, "mlp": mlp, "odd": Odd}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[name]()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.5, 0.5)
    return model.to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)


def quiet_report(model):
    return fastnn.report(model, console=Console(file=io.StringIO()))


def close(a, b, dtype):
    bound = 1e-4 if dtype == torch.float32 else 1e-10
    return (a - b).abs().max() <= bound * b.abs().max().clamp_min(1e-3)


def step(model, x):
    """Output, gradient of the input and of every parameter, and every buffer afterwards."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.double() for b in model.buffers())]
