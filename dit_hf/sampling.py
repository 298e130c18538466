"""Many images from a pipeline: batch by batch, each a function of the seed alone, whatever process draws it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from .data.vae import weights_sha256
from .pipelines.guidance import Attributes
from .pipelines.pipeline_latent_dit import LatentDiTPipeline
from .storage import facts_sha256, first_line
from .training.checkpoint import is_checkpoint

EXPORT = "export.json"  # what a finished run, or a push of it, says of itself


def load_pipeline(model: str, device: str | torch.device | None = None, **options: Any) -> LatentDiTPipeline:
    """The pipeline of a run's or a checkpoint's folder, of a pipeline's folder, or of a Hub id.

    Args:
        model: The folder of a run (its `pipeline/` is taken), of one of its checkpoints (its averaged weights are) or
            of a pipeline, or an id of the Hub.
        device: Where it goes; None is the accelerator where there is one.
        options: Of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: if no [`LatentDiTPipeline`] can be loaded from there.
    """
    folder = Path(model) / "pipeline"
    if is_checkpoint(model):
        from .training.export import checkpoint_pipeline  # which needs this module

        with tempfile.TemporaryDirectory(prefix="dit_hf-checkpoint-") as saved:
            checkpoint_pipeline(Path(model)).save_pretrained(saved)
            return load_pipeline(saved, device, **options)
    exported = (Path(model) / "model_index.json").is_file()  # what `dit-hf push` writes of a run has its log, too
    finished = folder.is_dir() and (Path(model) / EXPORT).is_file()  # which a run that is made longer loses
    if not exported and not finished and run_folder(model) == Path(model):
        raise ValueError(f"{model}: the run is not finished; name one of its checkpoints ({model}/checkpoint-...)")
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(folder) if folder.is_dir() else model, **options)
    except Exception as error:  # no such folder, no network, a damaged file: each raises its own
        raise ValueError(f"{model}: no pipeline could be loaded from there ({first_line(error)})") from error
    if not isinstance(pipeline, LatentDiTPipeline):
        raise ValueError(f"{model}: {type(pipeline).__name__} is no LatentDiTPipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return pipeline


def run_folder(model: str) -> Path | None:
    """The run's folder that `model` is, or whose `pipeline/` or checkpoint it is; None if it is none of these."""
    for folder in (Path(model), Path(model).absolute().parent):
        if (folder / "config.yaml").is_file() and (folder / "training_log.csv").is_file():
            return folder
    return None


def model_facts(pipeline: LatentDiTPipeline) -> dict[str, Any]:
    """What decides what a pipeline draws, wherever it was loaded from: weights (hashed), scheduler, normalisation."""
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return {
        "transformer_sha256": weights_sha256(pipeline.transformer),
        "vae_sha256": weights_sha256(pipeline.vae) if pipeline.vae is not None else None,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **json.loads(json.dumps(scheduler, default=str))},
        "latents": [pipeline.config.latents_mean, pipeline.config.latents_std],
    }


def model_sha256(pipeline: LatentDiTPipeline) -> str:
    """Of `model_facts`, and of the guidance that the pipeline has by default."""
    facts = {**model_facts(pipeline), "guidance_scale": pipeline.config.guidance_scale}
    return facts_sha256(facts)


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


def draw(
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
    """Pictures between 0 and 1, [batch, 3, height, width], as uint8 [batch, height, width, 3]."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
