"""No kernel reads past the end of a tensor, or before its start: next to it lies a page that cannot be read."""

import ctypes
import subprocess
import sys

import pytest
import torch
from cases import ALL, N, case, differentiable

import fastnn

PAGE = 4096
# Images and matrices smaller than what a tile of registers covers, in batches that lie one behind the other.
SMALL = [
    *[
        case("conv2d", N(n, c, h, w), N(k, c, h, s), None, 1, padding)
        for n, k in ((2, 1), (3, 2), (17, 3))
        for c, h, w, s, padding in (
            (1, 1, 3, 3, 0),
            (1, 2, 2, 1, 0),
            (2, 3, 3, 2, 0),
            (1, 1, 4, 2, (0, 1)),
            (3, 2, 5, 5, 0),
        )
    ],
    *[case("linear", N(m, k), N(n, k), N(n)) for m in (1, 2, 5) for k in (1, 3) for n in (1, 2, 7)],
]


class Edges:
    """Copies of tensors with an unreadable page behind their last element, or with `front` before their first."""

    def __init__(self, front):
        self.front, self.blocks, self.libc = front, [], ctypes.CDLL(None)
        self.libc.mmap.restype = ctypes.c_void_p

    def __call__(self, t):
        size = t.numel() * t.element_size()
        if size == 0:
            return t
        room = -(-size // PAGE) * PAGE
        start = self.libc.mmap(None, ctypes.c_size_t(room + 2 * PAGE), 3, 0x22, -1, ctypes.c_long(0))
        for page in (start, start + PAGE + room):
            assert self.libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
        self.blocks.append((start, room + 2 * PAGE))
        first = start + PAGE + (0 if self.front else room - size)
        memory = torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=t.dtype)
        return memory.as_strided(t.shape, t.stride()).copy_(t.detach()).requires_grad_(t.requires_grad)

    def give_back(self):
        for start, size in self.blocks:
            self.libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))
        self.blocks.clear()


def run(isa, front):
    """Every case with its gradients on such tensors. Prints each before it runs: what is read last is at fault."""
    torch.set_num_threads(1)
    fastnn._C.set_isa(isa)
    edges = Edges(front)
    for c in SMALL + [c for c in ALL if "aten" not in c.tags]:
        for layout in ("contiguous", "channels_last") if c.has_4d else ("contiguous",):
            for dtype in (torch.float32, torch.bfloat16):
                print(c.name, layout, dtype, flush=True)
                args, kwargs = c.build(dtype, layout=layout)
                args = [edges(a) if isinstance(a, torch.Tensor) else a for a in args]
                kwargs = {k: edges(a) if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
                y = c.fast(*args, **kwargs)
                y = y[0] if isinstance(y, tuple) else y
                if y.requires_grad:
                    torch.autograd.grad(y, differentiable(args, kwargs), edges(torch.randn_like(y)), allow_unused=True)
                del y, args, kwargs
                edges.give_back()


@pytest.mark.skipif(sys.platform != "linux", reason="the numbers of Linux's system calls")
@pytest.mark.parametrize("front", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("isa", fastnn._C.isas())
def test_nothing_beyond_a_tensor_is_read(isa, front):
    result = subprocess.run([sys.executable, __file__, isa, str(front)], capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout.splitlines()[-1:], result.stderr[-500:])


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2] == "True")
