"""Streams, graphs and a ban on synchronisation for the device under test.

On the CPU each is what comes closest, so that the tests of a device run on every machine, and work when one is at hand.
"""

import contextlib

import torch
from compare import DEVICES

DEVICE = DEVICES[-1]
ON_CUDA = DEVICE == "cuda"


@contextlib.contextmanager
def no_synchronisation():
    """An error for every operation inside that makes the host wait for the device."""
    if ON_CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode("default")


def synchronise():
    if ON_CUDA:
        torch.cuda.synchronize()


def new_stream():
    """A context that runs what is inside on a stream of its own, each time the same."""
    return torch.cuda.stream(torch.cuda.Stream()) if ON_CUDA else contextlib.nullcontext()


def capture(step, warm=2):
    """Runs step() a few times, then captures it in a CUDA graph: (its tensors, a function that replays it).

    On the CPU the step runs once more instead, and a replay is another call whose tensors are copied over the first's.
    """
    if not ON_CUDA:
        for _ in range(warm):
            step()
        results = step()

        def replay():
            for kept, fresh in zip(results, step(), strict=True):
                kept.copy_(fresh)

        return results, replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay
