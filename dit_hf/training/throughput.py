"""Speed of training: images a second, FLOPs and the share of the device's peak (MFU)."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from ..models.transformer_latent_dit import height_and_width

# Peak of dense fp16 and bf16 products in TFLOP/s by the words in the device's name; the first that fits (NVIDIA's data
# image grids).
PEAK_TFLOPS = {
    "B200": 2250,
    "GB200": 2500,
    "H200": 989,
    "GH200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "A40": 150,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "T4": 65,
}


class Speed:
    """Steps a second of the time in which there were steps.

    Attributes:
        steps: Since `read`; to be counted up.
    """

    def __init__(self) -> None:
        self.steps, self._began = 0, time.monotonic()

    def read(self) -> float:
        """Steps a second since the last call; the device must have been waited for."""
        now = time.monotonic()
        rate, self.steps, self._began = self.steps / (now - self._began), 0, now
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time the block takes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stopped = time.monotonic()
        yield
        self._began += time.monotonic() - stopped


def flops_per_image(config: Any) -> float:
    """FLOPs of forward and backward of one image: thrice the forward's matrix products, modulation not counted.

    A token takes (8 + 4 mlp_ratio) d^2 + 4 N d a layer, d the width and N the number of tokens.
    """
    height, width = height_and_width(config.sample_size)
    tokens = (height // config.patch_size) * (width // config.patch_size)
    dim = config.num_attention_heads * config.attention_head_dim
    token = (8 + 4 * config.mlp_ratio) * dim**2 + 4 * tokens * dim
    return 3.0 * tokens * config.num_layers * token


def mfu(config: Any, images_per_second: float, accelerator: Accelerator) -> float | None:
    """Share of the GPUs' peak that the model's FLOPs are; None where the peak is not known, or in float32."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device))
    if peak is None:
        return None
    return round(flops_per_image(config) * images_per_second / (peak * accelerator.num_processes), 4)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU's dense half-precision products; None where it is not known."""
    words = f" {re.sub('[^A-Za-z0-9]+', ' ', device_name)} "
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if f" {known} " in words), None)
