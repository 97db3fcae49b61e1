"""What only a CUDA device can show: graph capture, streams, no synchronisation. Without one there are no tests here."""

import torch
from compare import DEVICES

import fastnn

if "cuda" in DEVICES:
    import pytest
    from cases import ALL
    from compare import run

    def small_net(nn):
        return nn.Sequential(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(1440, 10)).cuda()

    @pytest.mark.parametrize("case", [c for c in ALL if "aten" not in c.tags], ids=lambda c: c.name)
    def test_no_synchronisation(case):
        def guarded(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return case.fast(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        run(guarded, case, torch.float32, device="cuda")

    def test_graph_capture_of_a_training_step():
        torch.manual_seed(0)
        model = small_net(fastnn)
        x, y = torch.randn(8, 1, 28, 28, device="cuda"), torch.randint(0, 10, (8,), device="cuda")

        def step():
            model.zero_grad(set_to_none=False)
            loss = fastnn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        x.copy_(torch.randn_like(x))
        graph.replay()
        gradients = [p.grad.clone() for p in model.parameters()]
        loss = step()
        assert torch.equal(captured, loss)
        assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))

    def test_graph_capture_of_a_model_in_evaluation():
        torch.manual_seed(0)
        model = fastnn.fuse(small_net(fastnn).eval())
        x = torch.randn(8, 1, 28, 28, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, model(x))

    def test_training_on_two_streams_at_once():
        """Two models trained on streams of their own, interleaved, end as they do one after the other."""

        def train(streams):
            models, inputs = [], []
            for seed in range(2):
                torch.manual_seed(seed)
                models.append(small_net(fastnn))
                inputs.append((torch.randn(16, 1, 28, 28, device="cuda"), torch.randint(0, 10, (16,), device="cuda")))
            optimizers = [fastnn.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in models]
            torch.cuda.synchronize()
            for _ in range(5):
                for i, stream in enumerate(streams):
                    with torch.cuda.stream(stream):
                        optimizers[i].zero_grad()
                        fastnn.functional.cross_entropy(models[i](inputs[i][0]), inputs[i][1]).backward()
                        optimizers[i].step()
            torch.cuda.synchronize()
            return [p.detach().clone() for m in models for p in m.parameters()]

        default = torch.cuda.default_stream()
        alone = train([default, default])
        both = train([torch.cuda.Stream(), torch.cuda.Stream()])
        for a, b in zip(alone, both, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("activation", [torch.nn.Identity, torch.nn.ReLU, torch.nn.ReLU6, torch.nn.SiLU])
    def test_fused_layers(activation, channels_last):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = fastnn.Conv2d(8, 8, 3, padding=1), fastnn.BatchNorm2d(8)
                self.depthwise, self.linear = fastnn.Conv2d(8, 8, 3, groups=8), fastnn.Linear(8, 70)
                self.act = activation()

            def forward(self, x):
                x = self.act(self.norm(self.conv(x)) + x)
                return self.act(self.linear(self.act(self.depthwise(x)).mean((2, 3))))

        torch.manual_seed(0)
        model, x = Net().cuda().eval(), torch.randn(4, 8, 9, 9, device="cuda")
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(fastnn.fuse(model)(x), model(x), rtol=1e-4, atol=1e-4)

    def test_autotune(tmp_path):
        model, x = small_net(fastnn), torch.randn(8, 1, 28, 28, device="cuda")
        expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        with fastnn.autotune(tmp_path) as tuner:
            for _ in range(2):
                actual = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        assert {key.split(" ")[0] for key in tuner.choices} >= {"conv2d", "linear"}
        assert all(ours > 0 and theirs > 0 for _, ours, theirs in tuner.choices.values())
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # tf32 may be allowed for one of them
        with fastnn.autotune(tmp_path, measure=False) as again:
            model(x)
        assert again.choices.items() <= tuner.choices.items()

    def test_side_stream():
        x = torch.randn(1 << 22, device="cuda").view(-1, 1024)
        expected = torch.softmax(x * 2, -1)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            y = x * 2  # late: a kernel on any other stream would read what is not written yet
            ours = fastnn.functional.softmax(y, -1)
        side.synchronize()
        torch.testing.assert_close(ours, expected)

    EXTRA = {
        "SGD": {"momentum": 0.9},
        "Adam": {"amsgrad": True},
        "AdamW": {"amsgrad": True},
        "RMSprop": {"momentum": 0.9, "centered": True},
    }

    def test_clip_grad_norm_without_synchronisation():
        grads = [torch.randn(s, device="cuda") for s in ((3,), (400, 400), (0, 4))]
        ours, torchs = ([torch.nn.Parameter(torch.zeros_like(g)) for g in grads] for _ in "ab")
        for g, p, q in zip(grads, ours, torchs, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = fastnn.clip_grad_norm_(ours, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(torchs, 1.0))
        for p, q in zip(ours, torchs, strict=True):
            torch.testing.assert_close(p.grad, q.grad)

    @pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "Adadelta"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_optimizer(name, dtype):
        options = {"lr": 1e-2, "weight_decay": 0.1, **EXTRA.get(name, {})}
        shapes = [(3,), (17, 5), (4, 3, 3, 3), (), (0, 4), (10000,)]
        ours, torchs = ([torch.nn.Parameter(torch.ones(s, device="cuda", dtype=dtype)) for s in shapes] for _ in "ab")
        a = getattr(fastnn.optim, name)(ours, **options)
        b = getattr(torch.optim, name)(torchs, **options)
        for _ in range(5):
            for p, q in zip(ours, torchs, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            a.step()
            b.step()
        assert fastnn.fallbacks() == {}
        for p, q in zip(ours, torchs, strict=True):
            torch.testing.assert_close(p, q, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
