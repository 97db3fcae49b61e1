"""mm, bmm, matmul and addmm."""

import torch

from fastnn import _C
from fastnn.functional._call import aten, has_torch_function, op, overridden

_mm = op("mm")
_bmm = op("bmm")
_matmul = op("matmul")
_REAL = (int, float)


def mm(input, mat2, out_dtype=None, *, out=None):
    """The product of two matrices.

    Args:
        input: (n, m) float32, float64, bfloat16 or float16, any strides.
        mat2: (m, p) of the same dtype.
        out_dtype, out: as in torch.mm; either one makes the call run on torch's kernel.

    Returns:
        (n, p), contiguous.

    Raises what torch.mm raises. Source: torch.mm.
    """
    if has_torch_function((input, mat2)):
        return overridden(mm, torch.mm, (input, mat2), input, mat2, **_given(out_dtype=out_dtype, out=out))
    if out is None and out_dtype is None:
        try:
            return _mm(input, mat2)
        except TypeError:
            pass
    return aten(torch.mm, input, mat2, **_given(out_dtype=out_dtype, out=out))


def bmm(input, mat2, out_dtype=None, *, out=None):
    """The products of two batches of matrices.

    Args:
        input: (b, n, m) float32, float64, bfloat16 or float16, any strides.
        mat2: (b, m, p) of the same dtype.
        out_dtype, out: as in torch.bmm; either one makes the call run on torch's kernel.

    Returns:
        (b, n, p), contiguous.

    Raises what torch.bmm raises. Source: torch.bmm.
    """
    if has_torch_function((input, mat2)):
        return overridden(bmm, torch.bmm, (input, mat2), input, mat2, **_given(out_dtype=out_dtype, out=out))
    if out is None and out_dtype is None:
        try:
            return _bmm(input, mat2)
        except TypeError:
            pass
    return aten(torch.bmm, input, mat2, **_given(out_dtype=out_dtype, out=out))


def matmul(input, other, *, out=None):
    """The matrix product of tensors of any rank from 1 up, batch dimensions broadcast.

    Args:
        input: (m,) or (..., n, m); float32, float64, bfloat16 or float16, any strides.
        other: (m,) or (..., m, p) of the same dtype.
        out: as in torch.matmul; makes the call run on torch's kernel.

    Returns:
        (..., n, p), contiguous, without n or p where that operand is a vector.

    Raises what torch.matmul raises. Source: torch.matmul.
    """
    if has_torch_function((input, other)):
        return overridden(matmul, torch.matmul, (input, other), input, other, **_given(out=out))
    if out is None:
        try:
            return _matmul(input, other)
        except TypeError:
            pass
    return aten(torch.matmul, input, other, **_given(out=out))


def addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None):
    """beta * input + alpha * (mat1 @ mat2); beta = 0 ignores input, NaN included.

    Args:
        input: anything that broadcasts to (n, p); float32, float64, bfloat16 or float16.
        mat1: (n, m), any strides.
        mat2: (m, p), any strides.
        beta, alpha: numbers.
        out: as in torch.addmm; makes the call run on torch's kernel.

    Returns:
        (n, p), contiguous.

    Raises what torch.addmm raises. Source: torch.addmm.
    """
    if has_torch_function((input, mat1, mat2)):
        options = _given(out=out)
        return overridden(addmm, torch.addmm, (input, mat1, mat2), input, mat1, mat2, beta=beta, alpha=alpha, **options)
    if out is None and type(beta) in _REAL and type(alpha) in _REAL:
        try:
            if torch.compiler.is_dynamo_compiling():
                return torch.ops.fastnn.addmm(input, mat1, mat2, beta=beta, alpha=alpha)
            return _C.addmm(input, mat1, mat2, beta, alpha)
        except TypeError:
            pass
    # torch's errors name the arguments that were given.
    options = {k: v for k, v in (("beta", beta), ("alpha", alpha)) if type(v) is not int or v != 1}
    return aten(torch.addmm, input, mat1, mat2, **options, **_given(out=out))


def _given(**options):
    return {k: v for k, v in options.items() if v is not None}
