"""Batches of generated images, each a function of the seed and the number of an image alone, on whichever rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..latents.vae import weights_sha256
from ..pipelines.attributes import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..seeds import mixed_seed
from ..storage import hash_json


def describe_model(pipeline: LatentDiTPipeline) -> dict[str, Any]:
    """Return all that decides the images of a pipeline: hashes of the weights, scheduler, normalisation.

    It is the same wherever the pipeline was loaded from.
    """
    # Keys with an underscore are diffusers' own, of how the config was loaded.
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        "transformer_sha256": weights_sha256(pipeline.transformer),
        "vae_sha256": weights_sha256(pipeline.vae) if pipeline.vae is not None else None,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **json.loads(json.dumps(scheduler, default=str))},
        "latents": [pipeline.config.latents_mean, pipeline.config.latents_std],
    }


def model_sha256(pipeline: LatentDiTPipeline) -> str:
    """Return the hash of `describe_model` and the default guidance of the pipeline."""
    return hash_json({**describe_model(pipeline), "guidance_scale": pipeline.config.guidance_scale})


MAX_IMAGES = 10_000_000  # of a series


def batches(num_images: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[range]:
    """Return the batches of images that a rank generates, as ranges of their numbers.

    Batch k is images k b … (k + 1) b - 1 on every rank and in every process, so that several ranks, or a process that
    was killed and resumed, generate the same bits.
    """
    starts = range(0, num_images, batch_size)[rank::num_ranks]
    return [range(start, min(start + batch_size, num_images)) for start in starts]


def generators(seed: int, images: Sequence[int]) -> list[torch.Generator]:
    """Return one generator an image, seeded by (seed, image); on the CPU, for the same noise on every device."""
    return [torch.Generator().manual_seed(mixed_seed(seed, image)) for image in images]


def generate_images(
    pipeline: LatentDiTPipeline, images: Sequence[int], rows: Sequence[Attributes] | None, seed: int, **options: Any
) -> np.ndarray:
    """Generate some images of a series.

    Args:
        pipeline: The pipeline that generates them.
        images: Their numbers.
        rows: Requested attributes of the series: those of image i are `rows[i % len(rows)]`; None is unconditional.
        seed: Seed of the series.
        options: Further arguments of the pipeline's call.

    Returns:
        uint8 [len(images), height, width, 3].
    """
    requested = [rows[image % len(rows)] for image in images] if rows else None
    options = batch_options(options, requested or [], images)
    (pixels,) = pipeline(
        requested, len(images), generator=generators(seed, images), output_type="pt", return_dict=False, **options
    )
    return to_uint8(pixels)


def batch_options(options: dict[str, Any], requested: Sequence[Attributes], images: Sequence[int]) -> dict[str, Any]:
    """Return the options of a batch of a series, so that an image does not depend on the others of its batch.

    Args:
        options: Of the whole series. `negative_attributes` may be a list, whose row i is for image i.
        requested: What the images of the batch request; a weight of another attribute is left out.
        images: Their numbers.
    """
    options = dict(options)
    if isinstance(rows := options.get("negative_attributes"), list):
        options["negative_attributes"] = [rows[image % len(rows)] for image in images]
    if weights := options.get("attribute_weights"):
        options["attribute_weights"] = {
            name: weight for name, weight in weights.items() if any(name in row for row in requested)
        }
    return options


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Convert images between 0 and 1, [batch, 3, height, width], to uint8 [batch, height, width, 3]."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
