"""Many images from a pipeline: batch by batch, each a function of the seed alone, whatever process draws it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..latents.vae import weights_sha256
from ..pipelines.attributes import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..storage import hash_json


def describe_model(pipeline: LatentDiTPipeline) -> dict[str, Any]:
    """What decides what a pipeline draws, wherever it was loaded from: weights (hashed), scheduler, normalisation."""
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        "transformer_sha256": weights_sha256(pipeline.transformer),
        "vae_sha256": weights_sha256(pipeline.vae) if pipeline.vae is not None else None,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **json.loads(json.dumps(scheduler, default=str))},
        "latents": [pipeline.config.latents_mean, pipeline.config.latents_std],
    }


def model_sha256(pipeline: LatentDiTPipeline) -> str:
    """Of `describe_model`, and of the guidance that the pipeline has by default."""
    facts = {**describe_model(pipeline), "guidance_scale": pipeline.config.guidance_scale}
    return hash_json(facts)


def batches(num_images: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[range]:
    """The batches of images that a rank draws.

    Batch k is images k b … (k + 1) b - 1 whoever draws it and whatever was drawn before, so that many ranks, or a
    process that was killed and went on, give the same bits.
    """
    starts = range(0, num_images, batch_size)[rank::num_ranks]
    return [range(start, min(start + batch_size, num_images)) for start in starts]


def generators(seed: int, images: Sequence[int]) -> list[torch.Generator]:
    """A generator an image, of (seed, image); on the CPU, so that noise is the same on every device."""
    return [torch.Generator().manual_seed(image_seed(seed, image)) for image in images]


def image_seed(seed: int, image: int) -> int:
    """The 63-bit seed of one image of a series."""
    return int(np.random.SeedSequence([seed, image]).generate_state(1, np.uint64)[0] >> 1)


def generate_images(
    pipeline: LatentDiTPipeline, images: Sequence[int], rows: Sequence[Attributes] | None, seed: int, **options: Any
) -> np.ndarray:
    """Images number `images` of a series, uint8 [len(images), height, width, 3].

    Args:
        pipeline: Draws them.
        images: Their numbers.
        rows: Attributes of the series: image i is asked for `rows[i % len(rows)]`; None asks for nothing.
        seed: Of the series.
        options: Of the pipeline's call.
    """
    asked = [rows[image % len(rows)] for image in images] if rows else None
    (pixels,) = pipeline(
        asked, len(images), generator=generators(seed, images), output_type="pt", return_dict=False, **options
    )
    return to_uint8(pixels)


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Images between 0 and 1, [batch, 3, height, width], as uint8 [batch, height, width, 3]."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
