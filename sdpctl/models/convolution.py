"""Convolutions that are fast and correct on maps of few pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 16
"""Largest map, in pixels, whose 1x1 convolution sees all images as rows of one image: oneDNN is slow with many tiny images."""


def convolve(conv: nn.Conv2d, x_NCHW: Tensor) -> Tensor:
    """Return the convolution of a map, (N, C, H, W), by a module whose padding is zeros."""
    if _takes_rows(conv, x_NCHW):
        images, channels, height, width = x_NCHW.shape
        rows_HWC = x_NCHW.movedim(1, -1).reshape(1, images * height, width, channels)
        out = F.conv2d(rows_HWC.movedim(-1, 1), conv.weight, conv.bias)
        return out.movedim(1, -1).reshape(images, height, width, -1).movedim(-1, 1)
    # Where the kernel covers a side with a single position, the stride does not matter. With a stride of 2, oneDNN leaves part
    # of the weight's gradient unwritten in this case in bfloat16 (torch 2.15).
    stride = conv.stride
    if stride != (1, 1):
        assert not isinstance(conv.padding, str)  # torch refuses a stride with padding='same'
        geometry = zip(x_NCHW.shape[2:], conv.kernel_size, conv.padding, conv.dilation, strict=True)
        single = [side + 2 * pad == apart * (kernel - 1) + 1 for side, kernel, pad, apart in geometry]
        stride = tuple([1 if one else step for one, step in zip(single, stride, strict=True)])
    return F.conv2d(x_NCHW, conv.weight, conv.bias, stride, conv.padding, conv.dilation, conv.groups)


def _takes_rows(conv: nn.Conv2d, x_NCHW: Tensor) -> bool:
    pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)
    return (
        pointwise
        and not torch.compiler.is_exporting()  # an exported file does not need the shortcut
        and x_NCHW.device.type == "cpu"
        and x_NCHW.shape[2] * x_NCHW.shape[3] <= FEW
        and x_NCHW.is_contiguous(memory_format=torch.channels_last)
    )


class Conv2d(nn.Conv2d):
    """A convolution that is fast and correct on maps of few pixels; its padding is zeros."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """Return the convolution of a map, (N, C, H, W)."""
        return convolve(self, input)
