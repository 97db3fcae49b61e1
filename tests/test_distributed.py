"""DDP, FSDP and SyncBatchNorm in two gloo processes: the parameters torch.nn gets."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastnn
from fastnn.train.data import load_digits

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 10, 16


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    ).double()  # fmt: skip


def train(model, criterion, parallel):
    """Ten steps on this process's digits; the state of the model underneath."""
    digits = load_digits()
    mine = slice(dist.get_rank(), STEPS * BATCH * dist.get_world_size(), dist.get_world_size())
    x, y = digits.train_x[mine].double(), digits.train_y[mine]
    wrapped = parallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        optimizer.zero_grad()
        criterion(wrapped(images), labels).backward()
        optimizer.step()
    state = wrapped.module.state_dict() if parallel is DistributedDataParallel else wrapped.state_dict()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plain, fast = network(), fastnn.convert(network())
    results = {
        "DDP": [train(copy.deepcopy(m), nn.CrossEntropyLoss(), DistributedDataParallel) for m in (plain, fast)],
        "FSDP": [train(copy.deepcopy(m), fastnn.CrossEntropyLoss(), fully_shard) for m in (plain, fast)],
    }
    half = fastnn.convert(network().float(), inplace=True)
    twin = network().float()
    results["DDP float32"] = [train(Cast(m), nn.CrossEntropyLoss(), DistributedDataParallel) for m in (twin, half)]
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.barrier()
    dist.destroy_process_group()


class Cast(nn.Module):
    """A float32 model fed with the double images of train()."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.float())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return torch.load(folder / "results")


@pytest.mark.parametrize("how,tolerance", [("DDP", 1e-10), ("FSDP", 1e-10), ("DDP float32", 1e-5)])
def test_parameters_after_ten_steps(results, how, tolerance):
    plain, fast = results[how]
    assert plain.keys() == fast.keys()
    start = network().state_dict()
    for name, expected in plain.items():
        assert (fast[name] - expected).abs().max() <= tolerance, name
    weight = next(n for n in plain if n.endswith("0.weight"))
    assert not torch.equal(plain[weight].double(), start["0.weight"]), "nothing was trained"


def test_sync_batch_norm_of_a_converted_model():
    model = fastnn.convert(network())
    keys = list(model.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[1]) is nn.SyncBatchNorm and type(synced[0]) is fastnn.Conv2d
    assert list(synced.state_dict()) == keys
    x = torch.randn(4, 1, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(synced.eval()(x), network().eval()(x))


@pytest.mark.parametrize("flags", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_torchrun_example(flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "examples" / "distributed.py"), "--steps", "3", *flags]
    result = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("loss") == 2, result.stdout
