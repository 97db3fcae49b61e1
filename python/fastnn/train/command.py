"""`python -m fastnn train`: options, live progress, the table, the PNG and the JSON file."""

import math
import os
import statistics

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastnn import _C, __version__
from fastnn._cli import Problem, check_writable, positive_float, positive_int, seed, set_threads, write_json
from fastnn.train import data, job, plot
from fastnn.train.model import OPTIMIZERS

DEFAULT_EPOCHS = {"digits": 60, "mnist": 2}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def add_options(parser):
    option = parser.add_argument
    option("--data", choices=["digits", "mnist"], default="digits",
           help="scikit-learn's digits, resized to 28x28 (default), or MNIST's IDX files from disk")  # fmt: skip
    option("--data-dir", metavar="DIR", help="the folder with MNIST's IDX files, plain or .gz")
    option("--epochs", type=positive_int, metavar="N", help="default: 60 for digits, 2 for mnist")
    option("--batch-size", type=positive_int, default=64, metavar="N", help="default: 64")
    option("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="default: sgd, with momentum 0.5")
    option("--lr", type=positive_float, help="learning rate; default: the optimizer's, 0.01 for sgd")
    option("--dtype", choices=list(DTYPES), default="float32", help="default: float32")
    option("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    option("--threads", type=positive_int, default=1, metavar="N", help="CPU threads; default: 1")
    option("--seed", type=seed, default=0, help="of the weights and the batches; default: 0")
    option("--png", metavar="FILE", default="fastnn_train.png",
           help="the picture; default: fastnn_train.png; none: no picture")  # fmt: skip
    option("--json", metavar="FILE", help="all figures, with the loss and the time of every step")


def run(options):
    """Runs the job with parsed options; raises Problem for what cannot be done."""
    device = check_device(options.device)
    if options.data_dir is not None and options.data != "mnist":
        raise Problem("--data-dir goes with --data mnist")
    draw = options.png != "none"
    if draw:
        plot.check_matplotlib()
        check_writable("--png", options.png)
    if options.json:
        check_writable("--json", options.json)
        if draw and os.path.realpath(options.json) == os.path.realpath(options.png):
            raise Problem(f"--json and --png name the same file, {options.json!r}")
    digits = data.load(options.data, options.data_dir).to(device, DTYPES[options.dtype])
    set_threads(options.threads)

    console = Console()
    epochs = options.epochs or DEFAULT_EPOCHS[options.data]
    steps = epochs * -(-len(digits.train_x) // options.batch_size)
    title = (f"MNIST CNN on {options.data}, {options.optimizer}, batch {options.batch_size}, {options.dtype}, "
             f"{where(device)}")  # fmt: skip
    console.print(
        f"{title}; {len(digits.train_x)} training and {len(digits.test_x)} test images", highlight=False, soft_wrap=True
    )
    with LiveProgress(console, steps, epochs) as progress:
        result = job.train(digits, epochs, options.batch_size, options.optimizer, options.lr, options.seed, progress)

    console.print(table(result))
    console.print(*summary(result), sep="\n", highlight=False)
    if draw:
        plot.save(options.png, result, title)
        console.print(f"wrote {options.png}", highlight=False, soft_wrap=True)
    if options.json:
        write_json(options.json, as_json(result, options, epochs))
        console.print(f"wrote {options.json}", highlight=False, soft_wrap=True)


def check_device(name):
    """The device, when this machine has it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Problem(f"--device: {name!r} is not cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise Problem(f"--device: {name!r} asks for CUDA, and this torch ({torch.__version__}) finds no GPU here")
        if (device.index or 0) >= torch.cuda.device_count():
            raise Problem(f"--device: {name!r} is not here; there are {torch.cuda.device_count()} GPUs")
    return device


def where(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_C.isa()}, {threads} thread{'s' if threads > 1 else ''}"


class LiveProgress:
    """The progress bar as a context manager; as a function, one step of it. Not on a terminal: ten lines of text."""

    def __init__(self, console, steps, epochs):
        self.console, self.epochs, self.done = console, epochs, -1
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"), BarColumn(16), TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=steps, epoch=f"0/{epochs}", text="")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def __call__(self, sides, epoch):
        text = "loss: " + "  ".join(f"{s.library.name} {s.losses[-1]:.4f} {1e3 * s.seconds[-1]:.1f} ms" for s in sides)
        self.bar.update(self.task, advance=1, epoch=f"{epoch + 1}/{self.epochs}", text=text)
        if not self.console.is_terminal and epoch != self.done and epoch % -(-self.epochs // 10) == 0:
            self.console.print(f"epoch {epoch + 1}/{self.epochs}  {text}", highlight=False, soft_wrap=True)
            self.done = epoch


def table(result):
    """The comparison, one line per library."""
    lines = Table(title="torch.nn and fastnn, from the same weights on the same batches")
    lines.add_column("layers")
    for name in ("training loss", "test accuracy", "ms/step", "ratio", "p20 to p80"):
        lines.add_column(name, justify="right")
    ratios = (("x1.00", ""), (f"x{result.ratio:.2f}", f"{result.p20:.2f} to {result.p80:.2f}"))
    for side, ratio in zip(result.sides(), ratios, strict=True):
        ms = 1e3 * statistics.median(side.seconds)
        figures = f"{result.loss(side):.5f}", f"{100 * side.accuracy:.2f} %", f"{ms:.3f}"
        lines.add_row(side.library.name, *figures, *ratio)
    return lines


def summary(result):
    """The sentences under the table."""
    first = list(zip(result.torch.losses, result.fastnn.losses, strict=True))[:200]
    if all(math.isfinite(loss) for pair in first for loss in pair):
        gap = max(abs(a - b) / max(abs(a), 1e-12) for a, b in first)
        yield f"largest difference of the losses in the first {len(first)} steps: {100 * gap:.2g} %"
    else:
        yield f"the training diverged in the first {len(first)} steps: a loss is not finite; a smaller --lr may help"
    if result.fallbacks:
        calls = ", ".join(f"{op} ({why}) {n} times" for (op, why), n in result.fallbacks.items())
        yield f"fastnn handed to torch's own kernels: {calls}"
    else:
        yield "fastnn ran every layer and every optimizer step on its own kernels"


def as_json(result, options, epochs):
    """Everything the job found, with the options that led to it."""
    return {
        "fastnn": __version__,
        "torch": torch.__version__,
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "options": {
            "data": options.data, "epochs": epochs, "batch_size": options.batch_size, "optimizer": options.optimizer,
            "lr": options.lr or OPTIMIZERS[options.optimizer][1]["lr"], "dtype": options.dtype,
            "device": options.device, "seed": options.seed,
        },
        "ratio": {"median": result.ratio, "p20": result.p20, "p80": result.p80},
        "fallbacks": [{"op": op, "reason": why, "calls": n} for (op, why), n in result.fallbacks.items()],
        "libraries": {
            side.library.name: {
                "training_loss": result.loss(side), "test_accuracy": side.accuracy,
                "ms_per_step": 1e3 * statistics.median(side.seconds),
                "losses": side.losses, "step_ms": [1e3 * s for s in side.seconds],
            }
            for side in result.sides()
        },
    }  # fmt: skip
