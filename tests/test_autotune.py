"""fastnn.autotune(): keys, the file, and the choice itself, with a timer that needs no device."""

import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastnn
from fastnn import _C
from fastnn.autotune import Cache, Tuner, cache_dir

IDENTITY = {"device": "a device", "torch": "1"}


class Timer:
    """Stands for the device's clock: runs both, and says what it was told to."""

    def __init__(self, ours, theirs):
        self.seconds, self.calls = (ours, theirs), 0

    def __call__(self, run, index):
        self.calls += 1
        run(True)
        run(False)
        return self.seconds


@pytest.fixture
def use():
    """use(tuner) makes it the one that the operators ask, until the test ends."""
    before = []

    def use(tuner):
        before.append(_C.set_cuda_tuner(tuner))
        return tuner

    yield use
    if before:
        _C.set_cuda_tuner(before[0])


def tuner(folder, timer, **options):
    return Tuner(folder, identity=lambda index: IDENTITY, timer=timer, capturing=lambda: False, **options)


def choose(a=None, b=None, op="mm", options=(), ran=None):
    a = torch.ones(4, 8) if a is None else a
    b = torch.ones(8, 2) if b is None else b
    return _C.choose_product(op, [a, b], list(options), (ran if ran is not None else []).append)


def the_file(folder):
    (path,) = Path(folder).glob("autotune-*.json")
    return json.loads(path.read_text())


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_without_autotune_the_table_decides():
    ran = []
    assert choose(ran=ran) == (False, "CUDA: cuBLAS, until measured")
    assert ran == []


@pytest.mark.parametrize("ours, theirs", [(1e-3, 2e-3), (2e-3, 1e-3)])
def test_the_faster_one_is_chosen(tmp_path, use, ours, theirs):
    timer, ran = Timer(ours, theirs), []
    tuned = use(tuner(tmp_path, timer))
    own, reason = choose(ran=ran)
    assert own == (ours < theirs) and (own or reason == "CUDA: cuBLAS was faster")
    assert ran == [True, False]  # the call itself, once each way
    assert choose(ran=ran)[0] == own and timer.calls == 1  # measured once
    assert list(tuned.choices.values()) == [(own, ours, theirs)]


def test_the_context_ends(tmp_path):
    with fastnn.autotune(tmp_path, measure=False) as outer:
        with fastnn.autotune(tmp_path, measure=False):
            pass
        assert _C.set_cuda_tuner(outer) is outer
    assert _C.set_cuda_tuner(None) is None
    with pytest.raises(ZeroDivisionError), fastnn.autotune(tmp_path):
        raise ZeroDivisionError
    assert _C.set_cuda_tuner(None) is None


def test_nothing_is_timed_on_request_and_during_graph_capture(tmp_path, use):
    timer = Timer(1, 2)
    use(tuner(tmp_path, timer, measure=False))
    assert choose() == (False, "CUDA: cuBLAS, until measured")
    capturing = use(tuner(tmp_path, timer))
    capturing.capturing = lambda: True
    assert choose() == (False, "CUDA: cuBLAS, until measured")
    capturing.capturing = lambda: False  # nothing of that was remembered
    assert choose()[0] and timer.calls == 1


def test_an_error_of_the_call_is_raised_and_nothing_kept(tmp_path, use):
    timer = Timer(1, 2)
    use(tuner(tmp_path, timer))

    def fails(own):
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        _C.choose_product("mm", [torch.ones(4, 8), torch.ones(8, 2)], [], fails)
    assert not list(tmp_path.iterdir())
    assert choose()[0] and timer.calls == 2


def test_timed_calls_are_not_counted_as_fallbacks(tmp_path, use):
    use(tuner(tmp_path, Timer(1, 2)))
    fastnn.fallbacks(clear=True)
    x = torch.ones(3, dtype=torch.int32)  # a dtype that goes to torch
    _C.choose_product("mm", [torch.ones(4, 8), torch.ones(8, 2)], [], lambda own: fastnn.functional.relu(x))
    assert fastnn.fallbacks() == {}
    fastnn.functional.relu(x)
    assert len(fastnn.fallbacks(clear=True)) == 1


def test_threads_measure_once(tmp_path, use):
    timer, barrier = Timer(1, 2), threading.Barrier(4)
    use(tuner(tmp_path, timer))

    def call(_):
        barrier.wait()
        return choose()[0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [True] * 4
    assert timer.calls == 1


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_every_difference_is_another_measurement(tmp_path, use):
    timer = Timer(1, 2)
    tuned = use(tuner(tmp_path, timer))
    calls = [
        {},
        {"op": "linear"},
        {"options": [1, 0]},
        {"options": [10]},
        {"a": torch.ones(5, 8)},
        {"a": torch.ones(8, 4).t()},
        {"a": torch.ones(4, 8).bfloat16(), "b": torch.ones(8, 2).bfloat16()},
        {"a": torch.ones(4, 8).double(), "b": torch.ones(8, 2).double()},
    ]
    for call in [*calls, *calls]:
        choose(**call)
    assert timer.calls == len(tuned.choices) == len(calls)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = not before
        choose()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    with torch.backends.cudnn.flags(benchmark=not torch.backends.cudnn.benchmark):
        choose()
    assert timer.calls == len(calls) + 2
    assert sorted(tuned.choices)[0].startswith("linear Float [4,8,] (8,1,) [8,2,] (2,1,) options")


# ---- the file ------------------------------------------------------------------------------------------------------


def test_the_next_process_reads_the_file(tmp_path, use):
    use(tuner(tmp_path, Timer(1, 2)))
    assert choose()[0]
    content = the_file(tmp_path)
    assert content["identity"] == {"format": 1, **IDENTITY} and list(content["seconds"].values()) == [[1.0, 2.0]]
    again = Timer(2, 1)
    use(tuner(tmp_path, again))  # forgets what the operators were told before
    assert choose()[0] and again.calls == 0


def test_another_device_or_version_has_another_file(tmp_path):
    for i, identity in enumerate([IDENTITY, {**IDENTITY, "device": "b"}, {**IDENTITY, "torch": "2"}]):
        cache = Cache(tmp_path, identity)
        assert cache.seconds == {}
        cache.add("key", 1, 2)
        assert len(list(tmp_path.glob("*.json"))) == i + 1


GOOD = json.dumps({"identity": {"format": 1, **IDENTITY}, "seconds": {"key": [1, 2]}})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", GOOD[:-2].encode(), b"\xff\xfe\x00", b"[]", b"null", b"{}", GOOD.replace("a device", "other").encode(),
     GOOD.replace("[1, 2]", "[1]").encode(), GOOD.replace("1, 2", '"x", 2').encode(),
     GOOD.replace("1, 2", "NaN, 2").encode(), GOOD.replace("1, 2", "-1, 2").encode(), b"[" * 100_000],
    ids=["empty", "brace", "truncated", "binary", "list", "null", "no fields", "identity", "one number", "text", "nan",
         "negative", "deep"],
)  # fmt: skip
def test_a_damaged_file_is_reported_and_replaced(tmp_path, content):
    path = Cache(tmp_path, IDENTITY).path
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and will be replaced"):
        cache = Cache(tmp_path, IDENTITY)
    assert cache.seconds == {}
    with pytest.warns(UserWarning, match="is damaged"):
        cache.add("key", 1, 2)
    assert Cache(tmp_path, IDENTITY).seconds == {"key": (1.0, 2.0)}


def test_a_writer_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    cache = Cache(tmp_path, IDENTITY)
    cache.add("first", 1, 2)

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        cache.add("second", 1, 2)
    monkeypatch.undo()
    assert Cache(tmp_path, IDENTITY).seconds == {"first": (1.0, 2.0)}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, use):
    (tmp_path / "file").write_text("")
    timer = Timer(1, 2)
    use(tuner(tmp_path / "file" / "folder", timer))
    with pytest.warns(UserWarning, match="cannot (read|write)"):
        assert choose()[0]
    assert choose()[0] and timer.calls == 1


def _write(folder, worker, count):
    cache = Cache(folder, IDENTITY)
    for i in range(count):
        cache.add(f"{worker} {i}", 1 + worker, 2)


def test_concurrent_writers_lose_nothing(tmp_path):
    workers = [multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path, w, 15)) for w in range(4)]
    for w in workers:
        w.start()
    while any(w.is_alive() for w in workers):  # a reader meanwhile sees whole files alone: a torn one would warn
        Cache(tmp_path, IDENTITY)
    assert [w.exitcode for w in workers] == [0] * 4
    seconds = Cache(tmp_path, IDENTITY).seconds
    assert seconds == {f"{w} {i}": (1.0 + w, 2.0) for w in range(4) for i in range(15)}


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTNN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_dir() == tmp_path / "fastnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "fastnn"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "fastnn"
    monkeypatch.setenv("FASTNN_CACHE_DIR", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
