"""What run_cuda.py measures: each row names a goal and builds (ours, torch's, compulsory bytes).

Ours and torch's are callables that return the same list of tensors, which run_cuda.py compares before it times them.
"""

import torch

import fastnn

F, FF = torch.nn.functional, fastnn.functional
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ROWS = []  # (name, goal, options, function); options: tolerance of the check, memory: the goal for ours / torch's peak


class Settings:
    """Where rows run. A dry run is one on the CPU with tiny tensors: it shows that the code of every row works."""

    device, dry = "cuda", False


def size(n):
    return min(n, 8) if Settings.dry else n


def row(name, goal, **options):
    """Registers a row, once per call; the function may take its name's parameters as defaults."""
    return lambda f: ROWS.append((name, goal, options, f)) or f


def text(dtype):
    return str(dtype).removeprefix("torch.")


def randn(*shape, dtype=FLOAT32, channels_last=False):
    x = torch.randn([size(n) for n in shape], device=Settings.device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def randint(high, *shape):
    return torch.randint(0, size(high), [size(n) for n in shape], device=Settings.device)


def train(ours, torchs, inputs, nbytes=0):
    """Forward and backward of both functions: [output, the inputs' gradients]. They take no arguments."""
    for x in inputs:
        x.requires_grad_()
    seed = torch.randn_like(torchs())

    def step(function):
        def call():
            y = function()
            return [y.detach(), *torch.autograd.grad(y, inputs, seed)]

        return call

    return step(ours), step(torchs), nbytes


def op(name, x, *args, passes=0, inputs=(), **kwargs):
    """The row of op(x, ...) in both libraries; its compulsory traffic is `passes` times the bytes of x."""

    def of(library):
        return lambda: getattr(library, name)(x, *args, **kwargs)

    return train(of(FF), of(F) if hasattr(F, name) else of(torch), [x, *inputs], int(passes * x.nbytes))


def backward(name, x, *args, passes=0):
    """The same for the backward pass alone."""
    x.requires_grad_()

    def of(library):
        y = getattr(library, name)(x, *args)
        return lambda: list(torch.autograd.grad(y, x, seed, retain_graph=True))

    seed = torch.randn_like(getattr(F, name)(x, *args))
    return of(FF), of(F), int(passes * x.nbytes)


# ---- the goals -----------------------------------------------------------------------------------------------------

for dtype, goal in ((FLOAT32, 1.3), (BFLOAT16, 1.6)):
    for layout in ("NCHW", "NHWC"):

        @row(f"max_pool2d 3x3/2 forward+backward {layout} {text(dtype)}", goal)
        def _(dtype=dtype, layout=layout):
            x = randn(64, 64, 112, 112, dtype=dtype, channels_last=layout == "NHWC")
            return op("max_pool2d", x, 3, 2, 1, passes=2.5)


for dtype in (FLOAT32, BFLOAT16):
    for layout in ("NCHW", "NHWC"):

        @row(f"avg_pool2d 2x2 backward {layout} {text(dtype)}", 2.5)
        def _(dtype=dtype, layout=layout):
            x = randn(64, 64, 112, 112, dtype=dtype, channels_last=layout == "NHWC")
            return backward("avg_pool2d", x, 2, passes=1.25)


for dtype in (FLOAT32, BFLOAT16):

    @row(f"batch_norm+add+relu training forward+backward NHWC {text(dtype)}", 1.6)
    def _(dtype=dtype):
        x, other = (randn(64, 64, 56, 56, dtype=dtype, channels_last=True) for _ in "ab")
        w, b = randn(64, dtype=dtype), randn(64, dtype=dtype)
        return train(
            lambda: FF.batch_norm_add_relu(x, other, None, None, w, b, True),
            lambda: F.relu(F.batch_norm(x, None, None, w, b, True) + other),
            [x, other], 8 * x.nbytes,
        )  # fmt: skip


for dtype, layout, goal in ((FLOAT32, "NCHW", 1.6), (FLOAT32, "NHWC", 0.95), (BFLOAT16, "NHWC", 0.95)):

    @row(f"batch_norm training forward+backward {layout} {text(dtype)}", goal)
    def _(dtype=dtype, layout=layout):
        x = randn(64, 64, 56, 56, dtype=dtype, channels_last=layout == "NHWC")
        w, b = randn(64, dtype=dtype), randn(64, dtype=dtype)
        return op("batch_norm", x, None, None, w, b, True, passes=5, inputs=[w, b])


for rows, classes in ((8192, 1000), (4096, 4096), (1024, 32768), (65536, 64)):
    for dtype in (FLOAT32, BFLOAT16):

        @row(f"softmax forward+backward {rows}x{classes} {text(dtype)}", 1.3)
        def _(rows=rows, classes=classes, dtype=dtype):
            return op("softmax", randn(rows, classes, dtype=dtype), -1, passes=5)


for rows, classes in ((2048, 32768), (1024, 131072), (8192, 1000)):
    for dtype in (FLOAT32, BFLOAT16):
        many = {"memory": 0.5} if classes > 30000 else {}

        @row(f"cross_entropy forward+backward {rows}x{classes} {text(dtype)}", 2.0 if many else 0.95, **many)
        def _(rows=rows, classes=classes, dtype=dtype):
            return op("cross_entropy", randn(rows, classes, dtype=dtype), randint(classes, rows), passes=3)


def stepper(cls, shapes, **options):
    """A callable for one step of an optimizer over parameters of these shapes: the parameters."""
    generator = torch.Generator(Settings.device).manual_seed(0)
    random = lambda s: torch.randn([size(n) for n in s], device=Settings.device, generator=generator)  # noqa: E731
    parameters = [torch.nn.Parameter(random(s)) for s in shapes]
    for p, s in zip(parameters, shapes, strict=True):
        p.grad = random(s)
    optimizer = cls(parameters, **options)

    def step():
        optimizer.step()
        return [p.detach() for p in parameters]

    return step, sum(p.nbytes for p in parameters)


MANY, FEW = [(400, 400)] * 160, [(10, 25), (10,), (320, 10)] * 2
for name, options, against, goal, passes in (
    ("Adam", {"lr": 1e-3}, "foreach", 2.5, 7),
    ("Adam", {"lr": 1e-3}, "fused", 1.0, 7),
    ("AdamW", {"lr": 1e-3}, "fused", 1.0, 7),
    ("SGD", {"lr": 1e-3, "momentum": 0.9}, "foreach", 0.95, 5),
    ("RMSprop", {"lr": 1e-3}, "foreach", 0.95, 5),
    ("Adagrad", {"lr": 1e-3}, "foreach", 0.95, 5),
    ("Adadelta", {"lr": 1e-3}, "foreach", 0.95, 7),
):
    for what, shapes in (("160 tensors of 25 M", MANY), ("6 small tensors", FEW)):
        if what == "160 tensors of 25 M" or name == "Adam":

            @row(f"{name} {what} against {against}", goal)
            def _(name=name, shapes=shapes, options=options, against=against, passes=passes):
                ours, nbytes = stepper(getattr(fastnn.optim, name), shapes, **options)
                theirs, _ = stepper(getattr(torch.optim, name), shapes, **options, **{against: True})
                return ours, theirs, passes * nbytes


def conv2d_row(n, channels, out, image, kernel, stride, groups, dtype, layout):
    channels, out, groups = size(channels), size(out), size(groups)
    channels_last = layout == "NHWC"
    x = randn(n, channels, image, image, dtype=dtype, channels_last=channels_last)
    w = torch.randn(out, channels // groups, kernel, kernel, device=Settings.device).to(dtype)
    if channels_last:
        w = w.contiguous(memory_format=torch.channels_last)
    return op("conv2d", x, w, None, stride, kernel // 2, 1, groups, passes=6, inputs=[w])


for layout in ("NCHW", "NHWC"):
    for kernel, stride in ((3, 1), (3, 2), (5, 1)):

        @row(f"conv2d depthwise {kernel}x{kernel}/{stride} forward+backward {layout} float32", 2.0, tolerance=1e-3)
        def _(layout=layout, kernel=kernel, stride=stride):
            return conv2d_row(32, 256, 256, 56, kernel, stride, 256, FLOAT32, layout)


@row("product linear 4096x4096x4096 strict float32", 1.5)
def _():
    x, w = randn(4096, 4096), randn(4096, 4096)
    return lambda: [FF.linear(x, w)], lambda: [F.linear(x, w)], 0


# ---- whole training steps ------------------------------------------------------------------------------------------


def training(nn, optim, build, x, y, autocast=None):
    """A callable for one step of the model that `build(nn)` defines: [loss]."""
    torch.manual_seed(0)
    model = build(nn).to(Settings.device)
    if x.is_contiguous(memory_format=torch.channels_last):
        model = model.to(memory_format=torch.channels_last)
    if autocast and nn is fastnn:
        model = fastnn.fuse(model)
    optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    cross_entropy = (FF if nn is fastnn else F).cross_entropy

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(Settings.device, autocast, enabled=autocast is not None):
            loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def both_train(build, x, classes, autocast=None):
    y = torch.randint(0, classes, (len(x),), device=Settings.device)
    ours = training(fastnn, fastnn.optim, build, x, y, autocast)
    return ours, training(torch.nn, torch.optim, build, x, y, autocast), 0


def captured(step):
    """The step as the replay of a CUDA graph; a dry run calls it."""
    if Settings.device != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return lambda: graph.replay() or result


def mnist_cnn(nn):
    features = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    return torch.nn.Sequential(*features, torch.nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10))


for replay in (False, True):

    @row(f"MNIST CNN training step, batch 64, float32{', CUDA graphs' * replay}", 0.95 if replay else 2.0)
    def _(replay=replay):
        x = torch.randn(size(64), 1, 28, 28, device=Settings.device)
        ours, torchs, nbytes = both_train(mnist_cnn, x, 10)
        return (captured(ours), captured(torchs), nbytes) if replay else (ours, torchs, nbytes)


class Bottleneck(torch.nn.Module):
    def __init__(self, nn, channels, width, stride):
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut = torch.nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = torch.nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50(nn):
    channels = size(64)
    layers = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(nn, channels, size(width), stride if i == 0 else 1))
            channels = 4 * size(width)
    return torch.nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nn.Linear(channels, 1000))


@row("ResNet-50 training step, batch 64, bfloat16 autocast NHWC, fused", 1.15)
def _():
    image = 32 if Settings.dry else 224
    x = torch.randn(size(64), 3, image, image, device=Settings.device).contiguous(memory_format=torch.channels_last)
    return both_train(resnet50, x, 1000, BFLOAT16)


# ---- everything else: at least x0.95 -------------------------------------------------------------------------------

for name in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"):
    for dtype in (FLOAT32, BFLOAT16) if name in ("relu", "gelu") else (FLOAT32,):

        @row(f"{name} forward+backward {text(dtype)}", 0.95)
        def _(name=name, dtype=dtype):
            return op(name, randn(64, 64, 56, 56, dtype=dtype), passes=5)


@row("log_softmax forward+backward 8192x1000 float32", 0.95)
def _():
    return op("log_softmax", randn(8192, 1000), -1, passes=5)


@row("softmax of columns forward+backward 64x21x128x128 float32", 0.95)
def _():
    return op("softmax", randn(64, 21, 128, 128), 1, passes=5)


@row("nll_loss forward+backward 65536x1000 float32", 0.95)
def _():
    return op("nll_loss", randn(65536, 1000), randint(1000, 65536), passes=1)


@row("cross_entropy of images forward+backward 16x21x256x256 float32", 0.95)
def _():
    return op("cross_entropy", randn(16, 21, 256, 256), randint(21, 16, 256, 256), passes=3)


@row("avg_pool2d 2x2 forward+backward NCHW float32", 0.95)
def _():
    return op("avg_pool2d", randn(64, 64, 112, 112), 2, passes=2.5)


for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):

    @row(f"{name} to 1x1 forward+backward NHWC bfloat16", 0.95)
    def _(name=name):
        return op(name, randn(64, 2048, 7, 7, dtype=BFLOAT16, channels_last=True), 1, passes=2)


@row("batch_norm evaluation NCHW float32", 0.95)
def _():
    x, mean, var = randn(64, 64, 56, 56), randn(64), randn(64).abs() + 0.5
    w, b = randn(64), randn(64)
    return lambda: [FF.batch_norm(x, mean, var, w, b)], lambda: [F.batch_norm(x, mean, var, w, b)], 2 * x.nbytes


@row("clip_grad_norm_ 160 tensors of 25 M against foreach", 0.95)
def _():
    def clipper(function, **options):
        parameters = [torch.nn.Parameter(randn(400, 400)) for _ in range(160)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        return lambda: [function(parameters, 1.0, **options), *(p.grad for p in parameters)]

    nbytes = 3 * 160 * randn(400, 400).nbytes
    return clipper(fastnn.clip_grad_norm_), clipper(torch.nn.utils.clip_grad_norm_, foreach=True), nbytes


# ---- products and convolutions: what the choice table is filled from (run_cuda.py --autotune --only product) ---------

for dtype in (FLOAT32, BFLOAT16):
    for m, k, n in ((64, 784, 128), (64, 128, 10), (1024, 1024, 1024), (8192, 512, 2048)):

        @row(f"product linear {m}x{k}x{n} forward+backward {text(dtype)}", 0.95, tolerance=1e-3)
        def _(m=m, k=k, n=n, dtype=dtype):
            w, b = randn(n, k, dtype=dtype), randn(n, dtype=dtype)
            return op("linear", randn(m, k, dtype=dtype), w, b, inputs=[w, b])

    @row(f"product bmm 128 of 64x64x64 forward+backward {text(dtype)}", 0.95, tolerance=1e-3)
    def _(dtype=dtype):
        b = randn(128, 64, 64, dtype=dtype)
        return op("bmm", randn(128, 64, 64, dtype=dtype), b, inputs=[b])

    for layout in ("NCHW", "NHWC"):
        for n, channels, out, image, kernel, stride, groups in (
            (64, 1, 32, 28, 3, 1, 1), (64, 32, 64, 26, 3, 1, 1), (64, 64, 64, 56, 1, 1, 1), (64, 64, 64, 56, 3, 1, 1),
            (64, 256, 256, 14, 3, 1, 1), (64, 3, 64, 224, 7, 2, 1), (32, 128, 128, 28, 3, 1, 32),
            (32, 256, 256, 56, 3, 1, 256),
        ):  # fmt: skip
            shape = f"{n}x{channels}x{image}x{image} to {out}, {kernel}x{kernel}/{stride}"
            shape += f", {groups} groups" * (groups > 1)

            @row(f"product conv2d {shape} forward+backward {layout} {text(dtype)}", 0.95, tolerance=1e-2)
            def _(sizes=(n, channels, out, image, kernel, stride, groups), dtype=dtype, layout=layout):
                return conv2d_row(*sizes, dtype, layout)
