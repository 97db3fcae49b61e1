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
