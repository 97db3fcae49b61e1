"""Every system of examples/ trains with fastnn as with torch.nn: the same losses from the same seed."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))
MODULES = {name: importlib.import_module(name) for name in ("basics", "images", "blocks", "tasks", "sequences")}
SYSTEMS = [(name, module.SYSTEMS[name]) for module in MODULES.values() for name in module.SYSTEMS]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("system", [s for _, s in SYSTEMS], ids=[name for name, _ in SYSTEMS])
def test_losses_are_torchs(system):
    losses = []
    for prepare in (lambda model: model, fastnn.convert):
        torch.manual_seed(0)
        losses.append(torch.tensor(system(prepare)))
    assert losses[0].unique().numel() > 1, "nothing was trained"
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=1e-5)


def test_parameter_counts():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    images, autoencoder = MODULES["images"], MODULES["tasks"].Autoencoder()
    assert count(images.MnistCnn()) == 8490 and count(images.cifar10_cnn()) == 145578
    assert count(images.SharedLayers()) == 31286 and count(images.large_images()) == 54273
    assert (count(autoencoder.encoder), count(autoencoder.decoder)) == (18672, 9569)


def test_a_fully_masked_row_is_nan_as_in_torch():
    scores = torch.full((2, 3), -torch.inf)
    assert fastnn.Softmax(dim=-1)(scores).isnan().all() and torch.softmax(scores, -1).isnan().all()


def test_example_as_a_script():
    result = subprocess.run([sys.executable, str(EXAMPLES / "basics.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("fastnn") == result.stdout.count("torch.nn") == 4
