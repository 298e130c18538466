"""Speed of training: images per second, FLOPs and model FLOPs utilization (MFU)."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from ..models.transformer_latent_dit import height_and_width

# Peak of dense fp16 and bf16 matrix products in TFLOP/s (NVIDIA's data sheets) by words of the device's name. The
# first match counts, so "H100 PCIe" comes before "H100".
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
    """Steps per second, without the time spent on anything else.

    Attributes:
        steps: Steps since the last `read`; the caller counts them.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._began = time.monotonic()

    def read(self) -> float:
        """Return the steps per second since the last call, and start again from 0.

        The caller must have waited for the device, or steps that are still under way would count as done.
        """
        now = time.monotonic()
        rate = self.steps / (now - self._began)
        self.steps = 0
        self._began = now
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        # Steps that the device is still working on are finished first: their time is not the block's.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stopped = time.monotonic()
        yield
        # As if the clock had stood still.
        self._began += time.monotonic() - stopped


def flops_per_image(config: Any) -> float:
    """Return the FLOPs of forward and backward of one image: three times the forward's matrix products.

    A token takes (8 + 4 mlp_ratio) d^2 + 4 N d FLOPs a layer, with width d and N tokens: 8 d^2 are attention's four
    projections, 4 mlp_ratio d^2 the feed-forward layer, 4 N d the products of attention itself. Modulation, computed
    once an image, is not counted.

    Args:
        config: The transformer's.
    """
    height, width = height_and_width(config.sample_size)
    tokens = (height // config.patch_size) * (width // config.patch_size)
    dim = config.num_attention_heads * config.attention_head_dim
    token = (8 + 4 * config.mlp_ratio) * dim**2 + 4 * tokens * dim
    return 3.0 * tokens * config.num_layers * token


def mfu(config: Any, images_per_second: float, accelerator: Accelerator) -> float | None:
    """Return the model FLOPs utilization, a fraction of the GPUs' peak; None in float32 or if the peak is not known.

    Args:
        config: The transformer's.
        images_per_second: Over all ranks.
        accelerator: Of the run.
    """
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device))
    if peak is None:
        return None
    return round(flops_per_image(config) * images_per_second / (peak * accelerator.num_processes), 4)


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a GPU's dense half-precision products; None if the GPU is not in the table."""
    # Whole words only: "A10" must not match "RTX A1000".
    words = f" {re.sub('[^A-Za-z0-9]+', ' ', device_name)} "
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if f" {name} " in words), None)
