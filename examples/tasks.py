"""More than classification: transfer learning, an autoencoder, two heads, a GAN, style transfer, segmentation."""

import torch
import torch.nn.functional as F
from common import batches, digits, show, train
from torch import nn


class Autoencoder(nn.Module):
    """28-26-24-8-6-4-1 and back; 18,672 + 9,569 parameters."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Conv2d(32, 32, 3),
            nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Upsample(scale_factor=4), nn.ConvTranspose2d(1, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 32, 3),
            nn.ReLU(), nn.Upsample(scale_factor=3), nn.ConvTranspose2d(32, 16, 3), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 3), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        return self.decoder(self.encoder(x).amax(1, keepdim=True))  # an image is one number in between


def autoencoder(prepare):
    model = prepare(Autoencoder())
    x, _ = digits(96)
    return train(model, torch.optim.SGD(model.parameters(), lr=0.05), nn.MSELoss(), batches(x, x, 32))


def backbone():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


def transfer(prepare):
    """Load a checkpoint, put a new head on, train the head alone, then everything with two learning rates."""
    checkpoint = nn.Sequential(backbone(), nn.Linear(64, 100)).state_dict()
    model = nn.Sequential(backbone(), nn.Linear(64, 100))
    model.load_state_dict(checkpoint)
    model[-1] = nn.Linear(64, 10)
    model.add_module("softmax", nn.LogSoftmax(dim=1))
    model = prepare(model)
    model[0].requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    data = batches(*digits(128, size=16), 32)
    losses = train(model, optimizer, nn.NLLLoss(), data)
    model[0].requires_grad_(True)
    return losses + train(model, optimizer, nn.NLLLoss(), data)


def two_heads(prepare):
    """One backbone, a class and a number (the digit's mean brightness)."""
    body, classes, number = prepare(nn.ModuleList([backbone(), nn.Linear(64, 10), nn.Linear(64, 1)]))
    optimizer = torch.optim.SGD([*body.parameters(), *classes.parameters(), *number.parameters()], lr=0.1)
    losses = []
    for x, y in batches(*digits(128, size=16), 32):
        features = body(x)
        loss = F.cross_entropy(classes(features), y)
        loss += F.mse_loss(number(features)[:, 0], x.mean((1, 2, 3)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gan(prepare):
    generator = prepare(nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.LeakyReLU(0.2), nn.Linear(128, 256),
        nn.Tanh(), nn.Unflatten(1, (1, 16, 16)),
    ))  # fmt: skip
    critic = prepare(nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(256, 1),
    ))  # fmt: skip
    optimizers = [torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (generator, critic)]
    judge, losses = nn.BCEWithLogitsLoss(), []
    for x, _ in batches(*digits(128, size=16), 32):
        real, unreal = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        made = generator(torch.randn(len(x), 8))
        loss = judge(critic(x), real) + judge(critic(made.detach()), unreal)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        fooled = judge(critic(made), real)
        optimizers[0].zero_grad()
        fooled.backward()
        optimizers[0].step()
        losses += [loss.item(), fooled.item()]
    return losses


def style_transfer(prepare):
    """Only the image has a gradient; the weights are frozen."""
    model = prepare(nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
    )).requires_grad_(False)  # fmt: skip
    content, style = digits(2, size=32)[0].split(1)

    def gram(features):
        flat = features.flatten(2)[0]
        return flat @ flat.T / flat.numel()

    wanted, wanted_gram = model(content), gram(model(style))
    image = content.clone().requires_grad_()
    optimizer, losses = torch.optim.Adam([image], lr=0.05), []
    for _ in range(20):
        features = model(image)
        loss = F.mse_loss(features, wanted) + 100 * F.mse_loss(gram(features), wanted_gram)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def segmentation(prepare):
    """A fully convolutional network: down, one score per class, up again by a transposed convolution."""
    model = prepare(nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 2, 1), nn.ConvTranspose2d(2, 2, 8, stride=4, padding=2),
    ))  # fmt: skip
    x, _ = digits(64, size=32)
    data = batches(x, (x[:, 0] > 0).long(), 16)
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), nn.CrossEntropyLoss(), data)


SYSTEMS = {
    "autoencoder": autoencoder, "transfer learning": transfer, "two heads": two_heads, "GAN": gan,
    "style transfer": style_transfer, "segmentation": segmentation,
}  # fmt: skip

if __name__ == "__main__":
    show(SYSTEMS)
