"""What fuse() leaves as written: a forward() that no graph stands for, other arguments, and blocks edited since."""

import collections
import copy
import dataclasses
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as TF
from fused_models import close, quiet_report, step
from torch import nn

import fastnn

# ---- what fx cannot trace ------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.body(x)
        return torch.relu(self.norm(self.conv(x))) if x.mean() > 0 else x


class Counts(Branches):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.norm(self.conv(self.body(x)))


class Draws(Branches):
    def forward(self, x):
        x = self.body(x)
        return torch.relu(self.norm(self.conv(x))) if random.random() < 0.5 else self.conv(x)


class Makes(Branches):
    def forward(self, x):
        return torch.relu(self.norm(self.conv(self.body(x)))) + torch.ones(1)


class Keeps(Branches):
    def __init__(self):
        super().__init__()
        self.outputs = []

    def forward(self, x):
        self.outputs.append(self.body(x))
        return torch.relu(self.norm(self.conv(self.outputs.pop() + 0 * len(self.outputs))))


class Remembers(Keeps):
    def forward(self, x):
        self.outputs.append(self.body(x))
        return torch.relu(self.norm(self.conv(self.outputs[-1])))


class FrozenStem(Branches):
    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
        return torch.relu(self.norm(self.conv(x)))


class Checkpoints(Branches):
    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
        return torch.relu(self.norm(self.conv(x)))


def test_a_list_that_ends_as_it_was_is_no_obstacle():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fastnn.fuse(Keeps())
    assert {row.name: row.reason for row in quiet_report(model)}["norm"].startswith("fused")


@pytest.mark.parametrize("kind", [Branches, Counts, Draws, Makes, Remembers, FrozenStem, Checkpoints])
def test_untraceable_blocks_stay_and_are_named(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Flatten(), nn.Linear(8 * 28 * 28, 3)).double()
    x = torch.randn(2, 3, 32, 32).double()
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"(?s)cannot trace.*\n  0: "):
        fastnn.fuse(model)
    assert not hasattr(model[0], "calls") and not getattr(model[0], "outputs", None)
    rows = {row.name: row.reason for row in quiet_report(model)}
    assert rows["0.body.1"] == "fused: 1 + 2" and rows["0.norm"] != "fused: norm + relu"
    for _ in range(3):
        random.seed(1)
        a = step(model, x)
        random.seed(1)
        b = step(twin, x)
        assert all((p is None and q is None) or close(p, q, torch.float64) for p, q in zip(a, b, strict=True))
    assert getattr(model[0], "calls", None) == getattr(twin[0], "calls", None)


@pytest.mark.parametrize("kind", [Branches, Counts, Draws])
def test_untraceable_blocks_in_a_frozen_copy(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Flatten(), nn.Linear(8 * 28 * 28, 3)).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    with pytest.warns(UserWarning, match=r"(?s)cannot trace.*\n  0: "):
        fused = fastnn.fuse(model)
    reasons = [row.reason for row in quiet_report(fused)]
    assert "fused: Conv2d + BatchNorm2d + ReLU" in reasons
    with torch.no_grad():
        for _ in range(3):
            random.seed(2)
            a = fused(x)
            random.seed(2)
            assert close(a, model(x), torch.float64)


class Positions(nn.Module):
    """Takes a shape, not a tensor, as some position encodings do."""

    def forward(self, shape):
        return torch.zeros(shape)


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.positions = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Positions()

    def forward(self, x):
        y = TF.relu(self.norm(self.conv(x)))
        return y + self.positions((y.shape[2], y.shape[3])) + math.ceil(y.shape[2] / 4)


@pytest.mark.filterwarnings("ignore:fastnn.fuse")
@pytest.mark.parametrize("training", [True, False])
def test_sizes_are_not_taken_for_tensors(training):
    model, x = Positioned().train(training), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(fastnn.fuse(model)(x), expected)


Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Record:
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Computed:
    """With fields that __init__() does not take, one of which has no value."""

    first: torch.Tensor
    second: torch.Tensor = dataclasses.field(init=False)
    third: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "second", self.first + 1)


def changed(y):
    made = Computed(y)
    object.__setattr__(made, "second", y * 2)
    return made


@dataclasses.dataclass
class DictRecord(collections.OrderedDict):
    """A dict and a dataclass, as transformers' outputs are."""

    first: torch.Tensor
    second: torch.Tensor | None = None

    def __post_init__(self):
        self.update({k: v for k, v in vars(self).items() if v is not None})


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.make = make

    def forward(self, x):
        return self.make(torch.relu(self.norm(self.conv(x))))


RESULTS = {
    "tuple": lambda y: (y, y.mean()), "list": lambda y: [y, None], "dict": lambda y: {"y": y, "n": [2.5, y]},
    "ordered": lambda y: collections.OrderedDict(y=y, z=y.mean((2, 3))), "named": lambda y: Pair(y, y.shape),
    "size": lambda y: y.shape, "record": lambda y: Record(y), "dict_record": lambda y: DictRecord(y, None),
    "records": lambda y: [Record(y, y + 1), Record(y)], "computed": Computed, "changed": changed,
}  # fmt: skip


def same_result(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return a.stride() == b.stride() and close(a, b, a.dtype)
    if dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a)]
        assert all(same_result(getattr(a, name, None), getattr(b, name, None)) for name in names)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_result(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(map(same_result, a, b))
    return dataclasses.is_dataclass(a) or a == b


@pytest.mark.parametrize("images", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RESULTS)
def test_results_are_of_the_models_types(name, training, images):
    torch.manual_seed(0)
    model = Returns(RESULTS[name]).train(training)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=images)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        fused = fastnn.fuse(model)
        assert any("fused" in row.reason for row in quiet_report(fused))
        assert same_result(fused(x), expected)


def test_a_dict_of_an_unknown_class_is_left_to_its_maker():
    model = Returns(lambda y: collections.Counter(y=y)).eval()
    with pytest.warns(UserWarning, match="makes a Counter"):
        fused = fastnn.fuse(model)
    assert type(fused(torch.randn(2, 3, 9, 9))) is collections.Counter


# ---- other arguments and later edits -------------------------------------------------------------------------------


def test_other_arguments_run_as_written():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, scale=None):
            y = torch.relu(self.norm(self.conv(x)))
            return y if scale is None else y * scale

    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    fastnn.fuse(model)
    for arguments, keywords in ((x,), {}), ((x, 2.0), {}), ((x,), {"scale": torch.ones(1)}):
        assert close(model(*arguments, **keywords), twin(*arguments, **keywords), torch.float32)


@pytest.mark.parametrize("of", ["slice", "double", "type"])
def test_a_block_made_of_a_fused_one_is_of_its_own_class(of):
    """Sequential makes its slices by its own class's constructor: such a block has no plan, and can be fused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x, twin = torch.randn(2, 3, 8, 8), copy.deepcopy(model)
    make = {"slice": lambda m: m[:3], "double": lambda m: m * 2, "type": lambda m: type(m)(*m)}[of]
    made, expected = make(fastnn.fuse(model)), make(twin)
    assert type(made) is nn.Sequential and repr(made) == repr(expected)
    torch.testing.assert_close(made(x), expected(x))
    fastnn.fuse(made)
    torch.testing.assert_close(made(x), expected(x))
    assert of == "double" or "fused" in quiet_report(made)[1].reason  # a layer that is called twice is not joined
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fastnn.revert(made).eval())(x), make(fastnn.revert(model)).eval()(x))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3)])

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("edit", ["append", "insert", "delete", "put_in_the_list"])
def test_blocks_edited_afterwards_run_as_edited(edit):
    """A layer more or less is seen at the next call; torch.fx recorded the ones there were."""
    torch.manual_seed(0)
    model = nn.Sequential(Listed(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    model, x = model.double().train(), torch.randn(2, 3, 9, 9).double()
    twin = copy.deepcopy(model)
    fused = fastnn.fuse(fastnn.convert(model))
    step(fused, x)
    step(twin, x)
    for m in (fused, twin):
        torch.manual_seed(1)
        if edit == "append":
            m.append(nn.Sigmoid())
        elif edit == "insert":
            m.insert(2, nn.Conv2d(4, 4, 3).double())
        elif edit == "delete":
            del m[4]
        else:
            m[0].layers.insert(1, nn.Conv2d(8, 8, 3, 2).double())
    for mode in (True, False):
        for a, b in zip(step(fused.train(mode), x), step(twin.train(mode), x), strict=True):
            assert close(a, b, torch.float64)
    reasons = {row.name: row.reason for row in quiet_report(fused)}
    assert reasons["3"] == ("fused: 3 + 4" if edit == "insert" else "fused: 2 + 3")
