"""Interpolation on the arc between noises."""

import pytest
import torch
from conftest import tiny_pipeline

from dit_hf.pipelines.interpolation import slerp


def test_interpolation_follows_the_arc_from_noise_to_noise():
    pipeline = tiny_pipeline()
    noises = torch.randn(3, 4, 8, 8)
    options = {"num_inference_steps": 2, "output_type": "pt", "attributes": {"Smiling": True}}
    frames = pipeline.interpolate(4, noises, **options)
    assert len(frames) == 7
    ends = pipeline(options["attributes"], 3, latents=noises, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(frames[[0, 3, 6]], ends, atol=1e-5, rtol=0)
    # By hand: the middle of an arc halves the angle and keeps the length, for noises of one length.
    start, end = noises[0] / noises[0].norm(), noises[1] / noises[1].norm()
    (middle,) = slerp(start, end, torch.tensor([0.5]))
    assert middle.norm() == pytest.approx(1, abs=1e-5)
    assert (middle * start).sum() == pytest.approx((middle * end).sum().item(), abs=1e-5)
    assert torch.equal(slerp(start, start, torch.tensor([0.3]))[0], start)
    assert len(pipeline.interpolate(2, generator=torch.Generator().manual_seed(0), num_inference_steps=1)) == 2
    with pytest.raises(ValueError, match="at least two noises and two frames"):
        pipeline.interpolate(1, noises)
