"""Large results on the CPU: blocks of fastnn's own in huge pages, of which freed ones are kept within a bound."""

import copy
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from cases import GEMM, differentiable

import fastnn

resource = pytest.importorskip("resource")
MB = 1 << 20


def big(megabytes, seed=0):
    return torch.randn(megabytes * MB // 4, generator=torch.Generator().manual_seed(seed))


def faults_of(function):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize(
    "bytes_", [MB - 4, MB + 4, 4 * MB // 3 - 4, 4 * MB // 3 + 4, 2 * MB, 2 * MB + 4, 3 * MB, 5 * MB + 12, 96 * MB]
)
def test_results_around_the_sizes_where_blocks_change(bytes_):
    x = torch.linspace(-1, 1, bytes_ // 4)
    for _ in range(3):
        assert torch.equal(fastnn.functional.relu(x), torch.relu(x))


@pytest.mark.skipif(sys.platform != "linux", reason="blocks of its own on Linux alone")
def test_a_loop_faults_no_pages():
    x = big(48)
    for _ in range(2):
        fastnn.functional.relu(x)
    assert faults_of(lambda: [fastnn.functional.relu(x) for _ in range(4)]) < 4 * 48 * MB // 4096 / 100


def test_results_do_not_overlap_and_keep_their_values():
    x = [big(3, seed) for seed in range(6)]
    for _ in range(3):
        y = [fastnn.functional.relu(t) for t in x]
        assert len({t.data_ptr() for t in y}) == len(y)
        assert all(torch.equal(a, torch.relu(b)) for a, b in zip(y, x, strict=True))


@pytest.mark.parametrize("elements", [16, MB, 8 * MB])
def test_a_result_can_be_resized(elements):
    y = fastnn.functional.relu(big(8))
    expected = y.clone()
    y.resize_(elements)
    kept = min(elements, expected.numel())
    assert torch.equal(y[:kept], expected[:kept])
    y.fill_(1)
    assert y.sum() == elements


KEPT = """if True:
    import os, resource, torch, fastnn
    MB = 1 << 20
    torch.set_num_threads(1)
    relu = fastnn.functional.relu
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB
    x = torch.ones(100 * MB // 4)
    def results(count, megabytes): return [relu(x[: megabytes * MB // 4]) for _ in range(count)]
    results(2, 2)
    before = resident()
"""


def in_its_own_process(program):
    subprocess.run([sys.executable, "-c", KEPT + program], check=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_as_much_is_kept_as_was_in_use():
    in_its_own_process("""
    held = results(8, 40)
    assert resident() - before > 8 * 40 * 0.9
    del held
    for megabytes in (40, 30, 50, 20):  # other sizes take the place of what is kept
        held = results(160 // megabytes, megabytes)
        assert resident() - before < 8 * 40 + 60, (megabytes, resident() - before)
        del held
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for step in range(4):
        held = results(6, 24)
        del held
        if step == 0: faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 100
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_kept_is_bounded_and_given_back():
    in_its_own_process("""
    held = results(12, 100)
    del held
    assert resident() - before < 1100
    for _ in range(2 * 4096 + 2): results(1, 1)
    assert resident() - before < 90, resident() - before
    """)


def test_threads_share_the_blocks():
    x = [big(2 + seed % 3, seed) for seed in range(4)]
    wrong = []

    def work(t):
        expected = torch.relu(t)
        for _ in range(50):
            if not torch.equal(fastnn.functional.relu(t), expected):
                wrong.append(t)

    threads = [threading.Thread(target=work, args=(t,)) for t in x]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_allocates_and_frees():
    program = """if True:
    import os, threading, torch, fastnn
    torch.set_num_threads(1)
    x = torch.randn(1 << 20)
    def busy():
        while not stop: fastnn.functional.relu(x)
    stop = False
    threads = [threading.Thread(target=busy) for _ in range(2)]
    for t in threads: t.start()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            ok = all(torch.equal(fastnn.functional.relu(x), x.clamp(0)) for _ in range(5))
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
    stop = True
    for t in threads: t.join()
    """
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert time.monotonic() - started < 300


def test_profiler_sees_the_blocks():
    x = big(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = fastnn.functional.relu(x)
        del y
    events = {e.key: e for e in profile.key_averages()}
    assert events["fastnn::relu"].cpu_memory_usage == 8 * MB
    assert events["[memory]"].cpu_memory_usage == -8 * MB


def test_the_variable_leaves_memory_to_torch():
    program = "import torch, fastnn; y = fastnn.functional.relu(torch.ones(1 << 20)); print(y.data_ptr() % (2 << 20))"
    own, torchs = (
        int(subprocess.run([sys.executable, "-c", program], env={**os.environ, **extra}, check=True, text=True,
                           capture_output=True).stdout)
        for extra in ({}, {"FASTNN_HUGE_PAGES": "0"})
    )  # fmt: skip
    assert (own == 0) == (sys.platform == "linux")
    assert torchs != 0


@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")])
def test_linear_keeps_no_input_for_a_frozen_weight(frozen):
    """As torch's: a frozen backbone's activations may be freed, or changed in place."""

    def step(layer):
        kept = []
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
        x = torch.ones(5, 6, 4, requires_grad=True)
        hidden = x * 2
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            y = layer(hidden)
        if frozen:
            hidden.add_(1)
        y.square().sum().backward()
        return max(kept), [x.grad, *(p.grad for p in layer.parameters())]

    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    expected, gradients = step(copy.deepcopy(layer))
    got, ours = step(fastnn.convert(copy.deepcopy(layer)))
    assert got == expected == (12 if frozen else 120)
    torch.testing.assert_close(ours, gradients)


@pytest.mark.parametrize("case", [c for c in GEMM if "big" not in c.tags], ids=lambda c: c.name)
def test_a_product_keeps_no_factor_without_use(case):
    """A factor is read by the other's gradient alone; where that is not wanted it may be freed, or changed in place."""
    count = len(differentiable(*case.build(torch.float32)))
    for wanted in itertools.product((False, True), repeat=count):
        kept, gradients = {}, {}
        for function in (case.fast, case.reference):
            args, kwargs = case.build(torch.float32)
            given = differentiable(args, kwargs)
            for t, wants in zip(given, wanted, strict=True):
                t.requires_grad_(wants)
            sizes = kept[function] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
                out = function(*args, **kwargs)
            if any(wanted):
                inputs = [t for t in given if t.requires_grad]
                gradients[function] = torch.autograd.grad(out, inputs, torch.ones_like(out))
        assert sum(kept[case.fast]) <= sum(kept[case.reference])
        if any(wanted):
            torch.testing.assert_close(gradients[case.fast], gradients[case.reference])
