"""What an evaluation prints before its work: what is compared, and how long that will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ..hub.card import example_attributes
from ..latents.vae import decode, encode
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..sampling.generate import generate_images
from .features import FeatureNet
from .reference_images import ReferenceImages

REFERENCE, SAMPLES, RECONSTRUCTIONS = "reference", "samples", "reconstructions"
# Images per sample that a reference of training images has at most. A Fréchet distance is too high by about
# c / samples + c / reference images: with ten times as many, the reference adds a tenth.
REFERENCE_PER_SAMPLE = 10


def describe_samples(num_samples: int, settings: list[dict[str, Any]]) -> str:
    """Return the line about what is generated."""
    each = [f"guidance {s['guidance_scale']:g} and {s['num_inference_steps']} steps" for s in settings]
    return f"samples    {num_samples:,} with {', '.join(each)}"


def describe_reference(summary: Mapping[str, Any]) -> str:
    """Return the line about the reference, from the summary of its images."""
    count, source, whole = summary["pictures"], summary["source"], summary.get("spread_over")
    if whole is None:
        return f"reference  {count:,} images ({source})"
    return (
        f"reference  {count:,} of {whole:,} images ({source}), evenly spread: {REFERENCE_PER_SAMPLE} per sample add "
        f"only a tenth to the bias of few samples; --num_images {whole} takes all"
    )


def describe_time(left: Mapping[str, int], seconds_per_image: Callable[[str], float], ranks: int) -> str:
    """Return the line about the time that an evaluation will take.

    Args:
        left: Images of each kind whose features are not there yet.
        seconds_per_image: Returns the seconds that an image of a kind takes.
        ranks: How many processes share the images.
    """
    times = {kind: count * seconds_per_image(kind) / ranks for kind, count in left.items() if count}
    if not times:
        return "time       short: earlier calls have computed all features"
    parts = ", ".join(f"{kind} {_duration(taken)}" for kind, taken in times.items())
    return f"time       about {_duration(sum(times.values()))} ({parts})"


@dataclass(frozen=True)
class Timing:
    """Measures how long an image of each kind takes, with its features.

    Attributes:
        pipeline: The model.
        net: The feature network.
        images: The reference's images, of which the first ones are read; None for statistics.
        settings: Combinations of `guidance_scale` and `num_inference_steps`.
        batch_size: Images at once on a GPU. A CPU needs fewer for its full speed.
    """

    pipeline: LatentDiTPipeline
    net: FeatureNet
    images: ReferenceImages | None
    settings: list[dict[str, Any]]
    batch_size: int

    def seconds(self, kind: str) -> float:
        """Return the seconds that an image of a kind takes, of several settings the mean."""
        count = self.batch_size if self.pipeline.device.type == "cuda" else min(self.batch_size, 2)
        if kind == REFERENCE:
            return _time(lambda: self._read(count)) / count
        if kind == RECONSTRUCTIONS:
            return _time(lambda: self._rebuild(count)) / count
        return sum(self._generate(count, setting) for setting in self.settings) / len(self.settings) / count

    def _read(self, count: int) -> None:
        assert self.images is not None  # there is nothing to read of statistics
        pixels, _ = self.images.read_intact(range(min(count, self.images.count)))
        if len(pixels):  # none if these are broken
            self.net(pixels)

    def _rebuild(self, count: int) -> None:
        vae, (height, width) = self.pipeline.vae, self.pipeline.resolution
        mean, _ = encode(vae, torch.zeros(count, height, width, 3, dtype=torch.uint8))
        self.net(decode(vae, mean).cpu().numpy())

    def _generate(self, count: int, setting: dict[str, Any]) -> float:
        requested = [example_attributes(self.pipeline)]

        def seconds(steps: int) -> float:
            options = {**setting, "num_inference_steps": steps}
            return _time(lambda: self.net(generate_images(self.pipeline, range(count), requested, 0, **options)))

        # All steps take the same time, so that two of them tell that of many.
        one, three = seconds(1), seconds(3)
        return one + max(0.0, three - one) / 2 * (setting["num_inference_steps"] - 1)


def _time(work: Callable[[], object]) -> float:
    """Return the mean seconds of `work`, done for at least 0.2 seconds after a first time, which is slower."""
    work()
    began, times = time.monotonic(), 0
    while not times or time.monotonic() - began < 0.2:
        work()
        times += 1
    return (time.monotonic() - began) / times


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(1, round(seconds))))
