"""`python -m fastnn bench`: a few shapes of every family and one training step, timed against torch."""

import math

import torch
from rich.console import Console
from rich.table import Table

from fastnn import _C, __version__, functional
from fastnn._cli import Problem, check_writable, positive_float, positive_int, set_threads, write_json
from fastnn.bench.ab import compare
from fastnn.info import fallbacks
from fastnn.train.model import FASTNN, TORCH, MnistCnn, make_optimizer


def add_options(parser):
    option = parser.add_argument
    option("--only", metavar="TEXT", help="only the lines whose name contains TEXT")
    option("--threads", type=positive_int, metavar="N", default=1, help="CPU threads; default: 1")
    option("--seconds", type=positive_float, default=0.3, help="time per line at least; default: 0.3")
    option("--json", metavar="FILE", help="the table's figures")


# ---- what is timed -------------------------------------------------------------------------------------------------


def layer(op, shape, *extra, **kwargs):
    """A pair of callables (fastnn, torch): forward and backward of one op on random tensors of these shapes."""
    x = torch.randn(shape, requires_grad=True)
    extra = [torch.randn(s).mul_(0.1).requires_grad_() if isinstance(s, tuple) else s for s in extra]
    inputs = [t for t in (x, *extra) if isinstance(t, torch.Tensor) and t.requires_grad]
    reference = getattr(torch.nn.functional, op)
    gradient = torch.randn_like(reference(x, *extra, **kwargs))

    def call(function):
        out = function(x, *extra, **kwargs)
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    ours = getattr(functional, op)
    return lambda: call(ours), lambda: call(reference)


def cross_entropy(rows, classes):
    x = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(classes, (rows,))

    def call(function):
        out = function(x, target)
        return [out, *torch.autograd.grad(out, x)]

    return lambda: call(functional.cross_entropy), lambda: call(torch.nn.functional.cross_entropy)


def batch_norm(*shape):
    statistics = torch.zeros(shape[1]), torch.ones(shape[1])
    return layer("batch_norm", shape, *statistics, (shape[1],), (shape[1],), training=True)


def optimizer_step(name, shapes):
    """One step over parameters of these shapes; both sides start equal and see the same gradients."""
    sides = []
    values = [(torch.randn(s), torch.randn(s)) for s in shapes]
    for library in (FASTNN, TORCH):
        parameters = [torch.nn.Parameter(value.clone()) for value, _ in values]
        for p, (_, gradient) in zip(parameters, values, strict=True):
            p.grad = gradient.clone()
        optimizer = make_optimizer(library, name, parameters)

        def call(optimizer=optimizer, parameters=parameters):
            optimizer.step()
            return parameters

        sides.append(call)
    return sides


def training_step(name, batch):
    """One step of the MNIST CNN: zero_grad, forward, loss, backward, optimizer."""
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    sides = []
    for library in (FASTNN, TORCH):
        torch.manual_seed(0)
        model = MnistCnn(library.nn)
        optimizer, criterion = make_optimizer(library, name, model.parameters()), library.nn.CrossEntropyLoss()

        def call(model=model, optimizer=optimizer, criterion=criterion):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            return [loss]

        sides.append(call)
    return sides


MLP = [(512, 784), (512,), (256, 512), (256,), (128, 256), (128,), (64, 128), (64,), (10, 64), (10,)]

LINES = {
    "linear 64x784 -> 512": lambda: layer("linear", (64, 784), (512, 784), (512,)),
    "linear 8x1024 -> 1024": lambda: layer("linear", (8, 1024), (1024, 1024), (1024,)),
    "conv2d 64x1x28x28, 5x5": lambda: layer("conv2d", (64, 1, 28, 28), (10, 1, 5, 5), (10,)),
    "conv2d 64x10x12x12, 5x5": lambda: layer("conv2d", (64, 10, 12, 12), (20, 10, 5, 5), (20,)),
    "conv2d 8x64x28x28, 1x1": lambda: layer("conv2d", (8, 64, 28, 28), (128, 64, 1, 1), (128,)),
    "conv2d 8x64x28x28, 3x3": lambda: layer("conv2d", (8, 64, 28, 28), (64, 64, 3, 3), (64,), padding=1),
    "max_pool2d 64x10x24x24, 2": lambda: layer("max_pool2d", (64, 10, 24, 24), kernel_size=2),
    "avg_pool2d 64x10x24x24, 2": lambda: layer("avg_pool2d", (64, 10, 24, 24), kernel_size=2),
    "adaptive_avg_pool2d 8x256x14x14": lambda: layer("adaptive_avg_pool2d", (8, 256, 14, 14), output_size=7),
    "relu 64x20x12x12": lambda: layer("relu", (64, 20, 12, 12)),
    "batch_norm 32x64x28x28": lambda: batch_norm(32, 64, 28, 28),
    "softmax 128x1000": lambda: layer("softmax", (128, 1000), dim=1),
    "log_softmax 64x10": lambda: layer("log_softmax", (64, 10), dim=1),
    "cross_entropy 64x10": lambda: cross_entropy(64, 10),
    "cross_entropy 128x1000": lambda: cross_entropy(128, 1000),
    "SGD, 10 tensors of an MLP": lambda: optimizer_step("sgd", MLP),
    "Adam, 10 tensors of an MLP": lambda: optimizer_step("adam", MLP),
    "MNIST CNN step, batch 64, SGD": lambda: training_step("sgd", 64),
    "MNIST CNN step, batch 64, Adam": lambda: training_step("adam", 64),
}

# ---- the command ---------------------------------------------------------------------------------------------------


def check(name, ours, reference):
    """Both callables once, their results compared: nothing wrong is timed."""
    for a, b in zip(ours(), reference(), strict=True):
        error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30)
        if not error <= 1e-4:
            raise Problem(f"{name}: fastnn and torch differ by {error:.2g}; nothing is timed")


def run(options):
    """Runs the lines and prints the table; raises Problem for what cannot be done."""
    chosen = [name for name in LINES if (options.only or "").lower() in name.lower()]
    if not chosen:
        raise Problem(f"--only: no line contains {options.only!r}; there are: {'; '.join(LINES)}")
    if options.json:
        check_writable("--json", options.json)
    set_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    table = Table(title=f"forward and backward, float32, {_C.isa()}, threads: {options.threads}")
    table.add_column("what", no_wrap=True)
    for name in ("fastnn us", "torch us", "ratio", "p20", "p80"):
        table.add_column(name, justify="right")
    rows = []
    with console.status("") as status:
        for name in chosen:
            status.update(name)
            ours, reference = LINES[name]()
            fallbacks(clear=True)
            check(name, ours, reference)
            handed = ", ".join(sorted({f"{op} ({why})" for op, why in fallbacks()}))
            r = compare(ours, reference, seconds=options.seconds)
            rows.append({"name": name, "fastnn_us": 1e6 * r.ours, "torch_us": 1e6 * r.reference, "ratio": r.ratio,
                         "p20": r.p20, "p80": r.p80, "fallbacks": handed})  # fmt: skip
            figures = f"{1e6 * r.ours:.1f}", f"{1e6 * r.reference:.1f}", f"x{r.ratio:.2f}"
            table.add_row(name, *figures, f"{r.p20:.2f}", f"{r.p80:.2f}")
    console.print(table)
    for row in rows:
        if row["fallbacks"]:
            console.print(f"{row['name']}: handed to torch's kernels: {row['fallbacks']}", highlight=False)
    mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))
    worst = min(rows, key=lambda row: row["ratio"])
    console.print(f"geometric mean x{mean:.2f}; worst x{worst['ratio']:.2f}, {worst['name']}", highlight=False)
    if options.json:
        facts = {"fastnn": __version__, "torch": torch.__version__, "isa": _C.isa(), "threads": options.threads}
        write_json(options.json, {**facts, "lines": rows})
