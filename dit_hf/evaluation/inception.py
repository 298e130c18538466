"""The Inception-v3 of the Fréchet Inception distance: TensorFlow's network of 2015-12-05, for features.

It differs from torchvision's Inception-v3: average pooling excludes the padding from the mean, the last block pools by
the maximum, and there are 1,008 classes. Layers are named as in the weights that pytorch-fid and torch-fidelity
publish. Architecture: Szegedy et al., "Rethinking the Inception Architecture" (https://arxiv.org/abs/1512.00567).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

_average_pool = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


class FIDInception(nn.Module):
    """Network from images (x - 128) / 128 of 299 px, [batch, 3, 299, 299], to spatially pooled features, [batch, dim].

    Args:
        features: 2048 (`pool3`, on which the FID is defined), or 64 (after the first max pooling).
    """

    def __init__(self, features: int = 2048):
        super().__init__()
        self.features = features
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        if features == 64:
            return
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB()
        self.Mixed_6b = _BlockC(128)
        self.Mixed_6c = _BlockC(160)
        self.Mixed_6d = _BlockC(160)
        self.Mixed_6e = _BlockC(192)
        self.Mixed_7a = _BlockD()
        self.Mixed_7b = _BlockE(1280, _average_pool)
        self.Mixed_7c = _BlockE(2048, functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))  # [batch, 64, 147, 147]
        hidden = _max_pool(hidden)  # [batch, 64, 73, 73]
        if self.features == 64:
            return hidden.mean((2, 3))  # [batch, 64]
        hidden = _max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden)))  # [batch, 192, 35, 35]
        hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden)))  # [batch, 288, 35, 35]
        hidden = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden)))  # [batch, 768, 17, 17]
        hidden = self.Mixed_6e(self.Mixed_6d(hidden))  # [batch, 768, 17, 17]
        hidden = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(hidden)))  # [batch, 2048, 8, 8]
        return hidden.mean((2, 3))  # [batch, 2048]


class _Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, padding: int = 0):
        super().__init__()
        sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
        # 1x7 and 7x1 kernels keep the size.
        paddings = (padding, padding) if sizes[0] == sizes[1] else (sizes[0] // 2, sizes[1] // 2)
        self.conv = nn.Conv2d(channels, width, sizes, stride, paddings, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(hidden)))


class _BlockA(nn.Module):
    """Block on 35 x 35, branches: 1x1, 5x5, two 3x3, pooling."""

    def __init__(self, channels: int, pool: int):
        super().__init__()
        self.branch1x1 = _Convolution(channels, 64, 1)
        self.branch5x5_1 = _Convolution(channels, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(channels, pool, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden)))
        five = self.branch5x5_2(self.branch5x5_1(hidden))
        pooled = self.branch_pool(_average_pool(hidden))
        return torch.cat([self.branch1x1(hidden), five, double, pooled], 1)  # [batch, 224 + pool, 35, 35]


class _BlockB(nn.Module):
    """Reduction from 35 x 35 to 17 x 17, branches: 3x3, two 3x3, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(288, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden)))
        return torch.cat([self.branch3x3(hidden), double, _max_pool(hidden)], 1)  # [batch, 768, 17, 17]


class _BlockC(nn.Module):
    """Block on 17 x 17, branches: 1x1, factorized 7x7, two factorized 7x7, pooling."""

    def __init__(self, inner: int):
        super().__init__()
        self.branch1x1 = _Convolution(768, 192, 1)
        self.branch7x7_1 = _Convolution(768, inner, 1)
        self.branch7x7_2 = _Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = _Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_1 = _Convolution(768, inner, 1)
        self.branch7x7dbl_2 = _Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = _Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = _Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = _Convolution(inner, 192, (1, 7))
        self.branch_pool = _Convolution(768, 192, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(hidden)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(hidden)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(_average_pool(hidden))
        return torch.cat([self.branch1x1(hidden), seven, double, pooled], 1)  # [batch, 768, 17, 17]


class _BlockD(nn.Module):
    """Reduction from 17 x 17 to 8 x 8, branches: 3x3, factorized 7x7 and 3x3, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(768, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(768, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_2(self.branch7x7x3_1(hidden))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        three = self.branch3x3_2(self.branch3x3_1(hidden))
        return torch.cat([three, seven, _max_pool(hidden)], 1)  # [batch, 1280, 8, 8]


class _BlockE(nn.Module):
    """Block on 8 x 8, branches: 1x1, 3x3 split into a row and a column, the same after a 3x3, and `pool`."""

    def __init__(self, channels: int, pool: functools.partial):
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Convolution(channels, 320, 1)
        self.branch3x3_1 = _Convolution(channels, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1))
        self.branch_pool = _Convolution(channels, 192, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_1(hidden)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))
        branches = [
            self.branch1x1(hidden),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(hidden)),
        ]
        return torch.cat(branches, 1)  # [batch, 2048, 8, 8]
