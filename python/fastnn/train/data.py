"""Handwritten digits for the main job: scikit-learn's, which come with it, or MNIST's IDX files from disk."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastnn._cli import Problem, reason

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the training images
DIGITS_MEAN, DIGITS_STD = 0.3053, 0.3247  # of scikit-learn's digits after resizing
TEST_SHARE = 1 / 3  # of scikit-learn's 1797 digits


@dataclass(frozen=True)
class Digits:
    """Normalised images [N, 1, 28, 28] and labels [N], for training and for testing."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    def to(self, device, dtype):
        return Digits(
            self.train_x.to(device, dtype), self.train_y.to(device),
            self.test_x.to(device, dtype), self.test_y.to(device),
        )  # fmt: skip


def load(name, data_dir=None):
    """The data set `digits` or `mnist`; raises Problem when it cannot be had."""
    return load_mnist(data_dir) if name == "mnist" else load_digits()


def load_digits():
    """scikit-learn's 1797 real digits, resized from 8x8 to 28x28; always the same third is for testing."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise Problem(
            f"--data digits needs scikit-learn ({reason(error)}): type `pip install scikit-learn`, "
            "or use --data mnist --data-dir DIR"
        ) from None
    images, labels = sklearn_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    x = torch.nn.functional.interpolate(x, size=(28, 28), mode="bilinear", align_corners=False)
    x, y = (x - DIGITS_MEAN) / DIGITS_STD, torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([int(len(x) * TEST_SHARE)])
    return Digits(x[train], y[train], x[test], y[test])


# ---- MNIST ---------------------------------------------------------------------------------------------------------

IMAGES_MAGIC, LABELS_MAGIC = 0x00000803, 0x00000801  # unsigned bytes in three dimensions, in one


def load_mnist(data_dir):
    """MNIST from its four IDX files, plain or .gz, in `data_dir` or where torchvision keeps them under it."""
    if data_dir is None:
        raise Problem("--data mnist needs --data-dir DIR, the folder with MNIST's IDX files")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise Problem(f"--data-dir: there is no folder {str(folder)!r}")
    parts = []
    for part in ("train", "t10k"):
        images_path = find(folder, f"{part}-images-idx3-ubyte")
        labels_path = find(folder, f"{part}-labels-idx1-ubyte")
        images = read_idx(images_path, IMAGES_MAGIC)
        labels = read_idx(labels_path, LABELS_MAGIC)
        if images.shape[1:] != (28, 28):
            raise Problem(f"{images_path}: images of {images.shape[1]}x{images.shape[2]} pixels, not 28x28")
        if len(images) == 0:
            raise Problem(f"{images_path}: no images in it")
        if len(images) != len(labels):
            raise Problem(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
        if labels.max() > 9:
            raise Problem(f"{labels_path}: label {labels.max()}; labels are 0 to 9")
        x = torch.from_numpy(images).float().unsqueeze(1) / 255
        parts += [(x - MNIST_MEAN) / MNIST_STD, torch.from_numpy(labels).long()]
    return Digits(*parts)


def find(folder, name):
    """The file `name` or `name`.gz in the folder, or in MNIST/raw under it."""
    for place in (folder, folder / "MNIST" / "raw"):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise Problem(f"--data-dir: neither {name} nor {name}.gz is in {str(folder)!r}")


def read_idx(path, magic):
    """The array of an IDX file of unsigned bytes; `magic` is the number it must open with.

    Format: 4 bytes of magic number (the last one counts the dimensions), each size in 4 bytes, big-endian, the data.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise Problem(f"{path}: cannot read it: {reason(error)}") from None
    found = int.from_bytes(data[:4], "big")
    if len(data) < 4 or found != magic:
        raise Problem(f"{path}: not an IDX file of {'images' if magic == IMAGES_MAGIC else 'labels'}: "
                      f"its magic number is {found}, not {magic}")  # fmt: skip
    dims = magic & 0xFF
    header = 4 + 4 * dims
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    wanted = header + math.prod(shape)
    if len(data) < header or len(data) != wanted:
        raise Problem(f"{path}: {'truncated' if len(data) < max(header, wanted) else 'too long'}: "
                      f"{len(data)} bytes where its header asks for {max(header, wanted)}")  # fmt: skip
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
