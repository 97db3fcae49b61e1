"""Networks of which fastnn has some layers: language models, attention, ViT, word2vec, SSD."""

import math

import torch
import torch.nn.functional as F
from common import digits, show
from torch import nn


class LanguageModel(nn.Module):
    def __init__(self, cell, words=40, width=24):
        super().__init__()
        self.embed, self.out = nn.Embedding(words, width), nn.Linear(width, words)
        self.cell = cell(width, width, batch_first=True)

    def forward(self, tokens, state=None):
        y, state = self.cell(self.embed(tokens), state)
        return self.out(y), state


def language_model(cell):
    """Truncated backpropagation through 35 steps, clipped gradients; the perplexities."""

    def system(prepare):
        model, text = prepare(LanguageModel(cell)), torch.randint(40, (4, 141))
        optimizer, state, perplexities = torch.optim.SGD(model.parameters(), lr=1.0), None, []
        for i in range(0, 140, 35):
            if state is not None:
                state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            scores, state = model(text[:, i : i + 35], state)
            loss = F.cross_entropy(scores.flatten(0, 1), text[:, i + 1 : i + 36].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            perplexities.append(math.exp(loss.item()))
        return perplexities

    return system


def fit(model, call, target, steps=5, criterion=F.cross_entropy):
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        loss = criterion(call(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Seq2Seq(nn.Module):
    """GRU encoder and decoder; the decoder attends by a scaled dot product."""

    def __init__(self, words=30, width=16):
        super().__init__()
        self.embed, self.encoder = nn.Embedding(words, width), nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.query, self.out = nn.Linear(width, width), nn.Linear(2 * width, words)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, source, target):
        memory, state = self.encoder(self.embed(source))
        y, _ = self.decoder(self.embed(target), state)
        weights = self.softmax(self.query(y) @ memory.mT / memory.shape[-1] ** 0.5)
        return self.out(torch.cat([y, weights @ memory], -1))


def seq2seq(prepare):
    model, source, target = prepare(Seq2Seq()), torch.randint(30, (4, 7)), torch.randint(30, (4, 6))
    return fit(model, lambda: model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())


def transformer(prepare):
    model = prepare(nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True))
    source, target = torch.randn(3, 6, 16), torch.randn(3, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    return fit(model, lambda: model(source, target, tgt_mask=mask), torch.randn(3, 5, 16), criterion=F.mse_loss)


class ViT(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, width, 7, stride=7), nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.encoder(x)[:, 0])


def vit(prepare):
    model, (x, y) = prepare(ViT()), digits(32)
    return fit(model, lambda: model(x), y)


def word2vec(prepare):
    """Skip-gram with negative sampling."""
    model = prepare(nn.ModuleList([nn.Embedding(50, 8), nn.Embedding(50, 8)]))
    centre, context = torch.randint(50, (16, 1)), torch.randint(50, (16, 6))
    labels = torch.tensor([1.0, 0, 0, 0, 0, 0]).repeat(16, 1)
    criterion = F.binary_cross_entropy_with_logits
    return fit(model, lambda: (model[0](centre) @ model[1](context).mT)[:, 0], labels, criterion=criterion)


class Ssd(nn.Module):
    """Classes and offsets for four anchors a pixel, on two scales."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in ((1, 8), (8, 16))
        )
        self.classes = nn.ModuleList(nn.Conv2d(c, 4 * 2, 3, padding=1) for c in (8, 16))
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4 * 4, 3, padding=1) for c in (8, 16))

    def forward(self, x):
        found = []
        for stage, classes, boxes in zip(self.stages, self.classes, self.boxes, strict=True):
            x = stage(x)
            parts = [head(x).permute(0, 2, 3, 1).reshape(len(x), -1, n) for head, n in ((classes, 2), (boxes, 4))]
            found.append(torch.cat(parts, -1))
        return torch.cat(found, 1)


def ssd(prepare):
    model, (x, _) = prepare(Ssd()), digits(8, size=16)
    target = torch.randn(8, 4 * (64 + 16), 6)
    return fit(model, lambda: model(x), target, criterion=F.smooth_l1_loss)


SYSTEMS = {
    "RNN language model": language_model(nn.RNN), "LSTM language model": language_model(nn.LSTM),
    "GRU language model": language_model(nn.GRU), "seq2seq with attention": seq2seq, "Transformer": transformer,
    "ViT": vit, "word2vec": word2vec, "SSD": ssd,
}  # fmt: skip

if __name__ == "__main__":
    show(SYSTEMS)
