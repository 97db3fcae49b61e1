"""Functions that tests run in spawned processes, which import this file alone."""

import torch


def run_and_change(model, x, result):
    """Writes the model's output into a shared tensor and adds 1 to its last bias."""
    with torch.no_grad():
        result.copy_(model(x))
        model[-1].bias.add_(1)
