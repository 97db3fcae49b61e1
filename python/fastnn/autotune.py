"""fastnn.autotune(): where fastnn's CUDA kernels and cuDNN or cuBLAS compete, whoever was faster on this device."""

import contextlib
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from fastnn import _C, _build

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes at once may each lose what the other has just measured
    fcntl = None

FORMAT = 1  # of the file


@contextlib.contextmanager
def autotune(cache=None, *, measure=True):
    """Measures fastnn's CUDA kernel against cuDNN's or cuBLAS's for every convolution and matrix product inside, and
    uses the faster one.

    The first call of an operator with given shapes, strides, dtype, arguments and precision settings (``allow_tf32``,
    ``fp32_precision``, ``cudnn.benchmark``, determinism) is timed both ways on its device, which takes some tens of
    milliseconds; the result stays in a file for the device, its driver and the versions of torch, cuDNN and fastnn, and
    later calls and processes read it there. Outside of the context the built-in table decides. Inside it the choice
    holds for all threads of the process, since the backward pass runs on threads of its own. While a CUDA graph is
    captured nothing is measured: run a step before. The choice may change how results are rounded: their last bits then
    depend on the machine. Layers on the CPU, and builds without CUDA kernels, are not affected.

        with fastnn.autotune() as tuner:
            train(model)
        print(tuner.choices)

    Args:
        cache: the folder of the files. Default: ``$FASTNN_CACHE_DIR``, else ``fastnn`` in the platform's cache folder
            (``$XDG_CACHE_HOME`` or ``~/.cache``; ``~/Library/Caches``; ``%LOCALAPPDATA%``).
        measure: False uses what the file has and times nothing.

    Yields:
        An object whose ``choices`` maps what has been used to ``(own is faster, seconds of ours, seconds of theirs)``.

    A damaged file is reported with a warning and replaced; a folder that cannot be written costs a warning, and the
    measurements are then kept in memory alone.
    """
    before = _C.set_cuda_tuner(tuner := Tuner(cache_dir() if cache is None else cache, measure))
    try:
        yield tuner
    finally:
        _C.set_cuda_tuner(before)


def cache_dir():
    """The folder for fastnn's files on this platform."""
    if given := os.environ.get("FASTNN_CACHE_DIR"):
        return Path(given)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastnn"


def identity_of(index):
    """What measurements on CUDA device `index` hold for."""
    from fastnn import __version__

    device, library = torch.cuda.get_device_properties(index), os.stat(_C.__file__)
    return {
        "device": device.name, "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count, "driver": torch._C._cuda_getDriverVersion(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "fastnn": __version__, "built with cuda": _build.CUDA, "build": [library.st_size, library.st_mtime_ns],
    }  # fmt: skip


def device_seconds(run, index, pairs=7, span=1e-3):
    """(ours, theirs): median seconds per run(True) and run(False) on a device, interleaved."""

    def elapsed(own, repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run(own)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    with torch.cuda.device(index):
        for own in (True, False):  # allocations, and the libraries' own choices
            run(own)
            run(own)
        repeats = max(1, min(100, int(span / max(elapsed(True, 2), elapsed(False, 2), 1e-7))))
        times = {True: [], False: []}
        for i in range(pairs):
            for own in (i % 2 == 0, i % 2 == 1):
                times[own].append(elapsed(own, repeats))
    return statistics.median(times[True]), statistics.median(times[False])


class Cache:
    """Measurements {key: (seconds of ours, seconds of theirs)} for one identity, in a file that processes share."""

    def __init__(self, folder, identity):
        self.identity = {"format": FORMAT, **identity}
        name = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(folder) / f"autotune-{name}.json"
        self.seconds = self._read()

    def _read(self):
        try:
            content = json.loads(self.path.read_text())
            if content["identity"] != self.identity:
                raise ValueError("it is another device's or version's")
            seconds = {str(key): (float(ours), float(theirs)) for key, (ours, theirs) in content["seconds"].items()}
            if not all(math.isfinite(t) and t > 0 for pair in seconds.values() for t in pair):
                raise ValueError("a time is not a positive number")
            return seconds
        except FileNotFoundError:
            return {}
        except OSError as error:
            warnings.warn(f"fastnn.autotune: cannot read {self.path}: {error}", stacklevel=2)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            warnings.warn(f"fastnn.autotune: {self.path} is damaged and will be replaced: {error}", stacklevel=2)
        return {}

    def add(self, key, ours, theirs):
        """Keeps a measurement, here and in the file, with what other processes have added there."""
        self.seconds[key] = ours, theirs
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self.seconds = {**self._read(), **self.seconds}
                self._write()
        except OSError as error:
            warnings.warn(f"fastnn.autotune: cannot write {self.path}: {error}", stacklevel=2)

    @contextlib.contextmanager
    def _locked(self):
        with open(self.path.with_suffix(".lock"), "w") as lock:  # freed by closing, also when the process dies
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self):
        """A reader sees the old file or the new one, whole."""
        handle, name = tempfile.mkstemp(prefix=self.path.stem, suffix=".tmp", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"identity": self.identity, "seconds": self.seconds}, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise


class Tuner:
    """What the operators ask: tuner(device index, key, run) is True where ours is faster, None for "by the table"."""

    def __init__(self, folder, measure=True, identity=identity_of, timer=device_seconds, capturing=None):
        self.folder, self.measure, self.identity, self.timer = folder, measure, identity, timer
        self.capturing = capturing or torch.cuda.is_current_stream_capturing
        self.choices = {}
        self._caches = {}
        self._lock = threading.RLock()  # one measurement at a time

    def __call__(self, index, key, run):
        with self._lock:
            if index not in self._caches:
                self._caches[index] = Cache(self.folder, self.identity(index))
            cache = self._caches[index]
            if key not in cache.seconds:
                if not self.measure or self.capturing():
                    return None
                cache.add(key, *self.timer(run, index))
            ours, theirs = cache.seconds[key]
            self.choices[key] = ours < theirs, ours, theirs
            return ours < theirs
