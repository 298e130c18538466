"""Speed and FLOPs, against torch's own count."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_hf.config import PRESETS
from dit_hf.models.transformer_latent_dit import LatentDiTTransformer2DModel
from dit_hf.training.throughput import Speed, flops_per_image, peak_flops


@pytest.mark.parametrize(("preset", "size"), [("tiny", 16), ("reference", 32), ("B/2", (32, 16))])
def test_flops_are_those_that_torch_counts(preset, size):
    """Except for the modulation, which is computed once an image and not once a token."""
    with torch.device("meta"):
        model = LatentDiTTransformer2DModel(sample_size=size, **PRESETS[preset])
    height, width = (size, size) if isinstance(size, int) else size
    noisy = torch.empty((8, 4, height, width), device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(noisy, torch.zeros(8, device="meta")).sample.sum().backward()
    counted = counter.get_flop_counts()
    blocks = sum(
        sum(counted[f"LatentDiTTransformer2DModel.transformer_blocks.{i}.{part}"].values())
        for i in range(len(model.transformer_blocks))
        for part in ("attn", "ff")
    )
    assert flops_per_image(model.config) * 8 == pytest.approx(blocks, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name_and_by_no_part_of_a_word(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_pauses_are_left_out_of_the_speed():
    began = time.monotonic()
    speed = Speed()
    time.sleep(0.05)
    with speed.paused():
        time.sleep(0.3)
    speed.steps = 10
    seconds_of_training = 10 / speed.read()
    assert 0.05 <= seconds_of_training <= time.monotonic() - began - 0.3
    time.sleep(0.05)
    speed.steps = 1
    assert speed.read() <= 1 / 0.05  # counted anew
