"""The kernels' loops really run on as many threads as torch is allowed."""

import subprocess
import sys

import pytest
import torch

import fastnn


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernels_use_the_threads_of_torch(threads):
    torch.set_num_threads(threads)
    assert fastnn._C.kernel_threads() == threads


def test_one_openmp_runtime_in_the_process():
    """A second runtime would bring a second pool of threads."""
    program = (
        "import torch, fastnn; fastnn._C.kernel_threads();"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libiomp' in line})"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(eval(out)) == 1, out
