"""Which convolution algorithms may trade rounding error for speed."""

from fastnn import _C


class set_strict_conv:
    """Forbids (True) or allows (False, the default) Winograd convolution for the whole process.

    A float32 convolution of stride 1 runs by Winograd's F(5x5, 2x2), F(4x4, 3x3), F(3x3, 4x4) or F(4x4, 5x5), by the
    size of its kernel (Lavin & Gray, arXiv:1509.09308), where that is faster: two to four times on large images of 16
    channels and more, for most layers of 4 and more, with a larger rounding error. So does one with a stride of 2 or 4
    and a kernel larger than it (the 7x7/2 and 11x11/4 first layers of ResNet and AlexNet, the 4x4/2 ones of DCGAN),
    each pixel phase of the stride being a channel.
    Each output is within 2**-17 * max(conv2d(abs(x), abs(w))) of the exact result (measured: within 0.75 of that; a
    plain float32 sum stays about ten times closer), and so are both gradients with their own factors. In strict mode
    every convolution is a plain sum, within twice the rounding error of torch's.

    Works at once when called, and restores the mode before when used as a context manager:

        fastnn.set_strict_conv(True)
        with fastnn.set_strict_conv(True): ...
    """

    def __init__(self, strict):
        self._before = _C.conv2d_set_strict(bool(strict))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        _C.conv2d_set_strict(self._before)
        return False
