"""The command line: train, bench and info end to end, MNIST's files, and one line for every mistake."""

import gzip
import json
import subprocess
import sys

import pytest
import torch

from fastnn.__main__ import main
from fastnn.train import data


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def idx(tensor):
    """The IDX file of a tensor of bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, 8, tensor.dim()]) + sizes + tensor.numpy().tobytes()


def write_mnist(folder, packed=False, count=96):
    """MNIST's four files, with scikit-learn's digits in them."""
    digits = data.load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    for part, x, y in (("train", digits.train_x, digits.train_y), ("t10k", digits.test_x, digits.test_y)):
        pixels = ((x[:count, 0] * data.DIGITS_STD + data.DIGITS_MEAN) * 255).round().clamp(0, 255)
        for name, values in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", y[:count])):
            content = idx(values.to(torch.uint8))
            name = f"{part}-{name}"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_train_end_to_end(tmp_path):
    command = [sys.executable, "-m", "fastnn", "train", "--epochs", "2", "--seed", "3", "--threads", "1"]
    command += ["--png", "curves.png", "--json", "figures.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for text in ("epoch 2/2", "torch.nn", "fastnn", "training loss", "test accuracy", "ratio", "wrote curves.png"):
        assert text in result.stdout
    assert "fastnn ran every layer and every optimizer step on its own kernels" in result.stdout
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, theirs = figures["libraries"]["fastnn"], figures["libraries"]["torch.nn"]
    assert len(ours["losses"]) == len(theirs["step_ms"]) == 2 * 19
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)
    assert figures["fallbacks"] == [] and figures["threads"] == 1 and figures["ratio"]["median"] > 0


@pytest.mark.parametrize("packed,place", [(False, ""), (True, "MNIST/raw")], ids=["plain", "gz-torchvision"])
def test_train_on_mnist_files(tmp_path, capsys, packed, place):
    write_mnist(tmp_path / "data" / place, packed)
    command = "train --data mnist --data-dir data --epochs 1 --batch-size 20 --optimizer adam --png none"
    assert main([*command.split(), "--json", "out.json", "--dtype", "float64"]) == 0
    assert "96 training and 96 test images" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert len(figures["libraries"]["fastnn"]["losses"]) == 5  # the last batch is partial
    assert not (tmp_path / "fastnn_train.png").exists()


def test_idx_files_keep_their_pixels(tmp_path):
    write_mnist(tmp_path, packed=True, count=10)
    mnist, digits = data.load("mnist", tmp_path), data.load("digits")
    assert torch.equal(mnist.train_y, digits.train_y[:10])
    wanted = (digits.test_x[:10] * data.DIGITS_STD + data.DIGITS_MEAN - data.MNIST_MEAN) / data.MNIST_STD
    torch.testing.assert_close(mnist.test_x, wanted, rtol=0, atol=0.51 / 255 / data.MNIST_STD)


def test_digits_are_split_the_same_way_every_time():
    first, second = data.load_digits(), data.load_digits()
    assert torch.equal(first.test_x, second.test_x)
    assert len(first.train_x) + len(first.test_x) == 1797
    assert first.train_x.shape[1:] == (1, 28, 28)
    assert sorted(first.test_y.unique().tolist()) == list(range(10))


def test_diverging_training_says_so(capsys):
    assert main("train --epochs 1 --lr 1e30 --json out.json".split()) == 0
    assert "a loss is not finite" in capsys.readouterr().out
    losses = json.load(open("out.json"))["libraries"]["fastnn"]["losses"]
    assert losses[0] > 0 and losses[-1] is None


def test_bench(tmp_path, capsys):
    assert main("bench --only softmax --seconds 0.01 --json out.json".split()) == 0
    assert "log_softmax 64x10" in capsys.readouterr().out
    lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert [line["name"] for line in lines] == ["softmax 128x1000", "log_softmax 64x10"]
    assert all(line["fallbacks"] == "" and line["ratio"] > 0 for line in lines)


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "bfloat16" in out and "max_pool2d" in out


# ---- mistakes ------------------------------------------------------------------------------------------------------


def mistake(capsys, *arguments):
    """The one line on stderr of a command that has to end with status 2."""
    try:
        status = main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == "" and err.count("\n") == 1 and err.startswith("python -m fastnn")
    return err


@pytest.mark.parametrize(
    "arguments,text",
    [
        ("", "required"),
        ("fly", "invalid choice: 'fly'"),
        ("train --fly", "--fly"),
        ("train --epochs 0", "'0' is not a whole number from 1 up"),
        ("train --epochs 1.5", "'1.5' is not a whole number"),
        ("train --batch-size -1", "'-1' is not a whole number"),
        ("train --threads 0", "'0' is not a whole number"),
        ("train --threads 100000", "this machine has"),
        ("train --seed -1", "'-1' is not a whole number from 0 up"),
        ("train --lr 0", "'0' is not a number above 0"),
        ("train --lr nan", "'nan' is not a number"),
        ("train --optimizer lion", "invalid choice: 'lion'"),
        ("train --dtype int8", "invalid choice: 'int8'"),
        ("train --device toaster", "'toaster' is not cpu, cuda or cuda:N"),
        ("train --device meta", "'meta' is not cpu, cuda or cuda:N"),
        ("train --device cuda:99", "'cuda:99'"),
        ("train --png no/such/folder.png", "cannot write 'no/such/folder.png': No such file"),
        ("train --json .", "cannot write '.': Is a directory"),
        ("train --png a --json a", "name the same file"),
        ("train --data-dir .", "--data-dir goes with --data mnist"),
        ("train --data mnist", "needs --data-dir"),
        ("train --data mnist --data-dir nowhere", "there is no folder 'nowhere'"),
        ("train --data mnist --data-dir .", "neither train-images-idx3-ubyte nor"),
        ("bench --only nothing", "no line contains 'nothing'"),
        ("bench --json no/such/folder.json", "cannot write"),
    ],
)
def test_mistake_is_one_line(capsys, arguments, text):
    assert text in mistake(capsys, *arguments.split())


@pytest.mark.parametrize("module,text", [("sklearn.datasets", "scikit-learn"), ("matplotlib.figure", "matplotlib")])
def test_missing_package_is_one_line(capsys, monkeypatch, module, text):
    monkeypatch.setitem(sys.modules, module, None)
    assert text in mistake(capsys, "train")


def damaged(kind, folder):
    """Writes MNIST files with one defect; returns the text that must name it."""
    write_mnist(folder, packed=kind.startswith("gz"), count=3)
    images, labels = folder / "train-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"
    packed = folder / "train-images-idx3-ubyte.gz"
    if kind == "magic":
        images.write_bytes(labels.read_bytes())
        return "not an IDX file of images: its magic number is 2049, not 2051"
    if kind == "empty":
        labels.write_bytes(b"")
        return "not an IDX file of labels"
    if kind == "header":
        images.write_bytes(images.read_bytes()[:10])
        return "truncated"
    if kind == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
        return "truncated: 2367 bytes where its header asks for 2368"
    if kind == "long":
        images.write_bytes(images.read_bytes() + b"0")
        return "too long: 2369 bytes"
    if kind == "huge":
        images.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
        return "truncated"
    if kind == "size":
        images.write_bytes(idx(torch.zeros(3, 20, 20, dtype=torch.uint8)))
        return "images of 20x20 pixels, not 28x28"
    if kind == "none":
        images.write_bytes(idx(torch.zeros(0, 28, 28, dtype=torch.uint8)))
        return "no images"
    if kind == "count":
        labels.write_bytes(idx(torch.zeros(5, dtype=torch.uint8)))
        return "5 labels for the 3 images"
    if kind == "label":
        labels.write_bytes(idx(torch.tensor([1, 2, 77], dtype=torch.uint8)))
        return "label 77; labels are 0 to 9"
    if kind == "gz-plain":
        packed.write_bytes(b"not gzip at all")
        return "cannot read it: Not a gzipped file"
    if kind == "gz-cut":
        packed.write_bytes(packed.read_bytes()[:-20])
        return "cannot read it"
    assert kind == "gz-bits"
    content = bytearray(packed.read_bytes())
    content[20:40] = b"\xff" * 20
    packed.write_bytes(content)
    return "cannot read it"


KINDS = ["magic", "empty", "header", "truncated", "long", "huge", "size", "none", "count", "label"]


@pytest.mark.parametrize("kind", [*KINDS, "gz-plain", "gz-cut", "gz-bits"])
def test_damaged_mnist_file_is_one_line(tmp_path, capsys, kind):
    text = damaged(kind, tmp_path)
    assert text in mistake(capsys, "train", "--data", "mnist", "--data-dir", str(tmp_path))


def test_mistake_ends_the_process_with_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "fastnn", "train", "--optimizer", "lion"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
