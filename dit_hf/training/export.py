"""The results of a run: sample grids while it trains, and at its end the pipeline, loss curve and card."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..hub.background_push import BackgroundPush
from ..hub.card import write_run_card
from ..hub.push import write_repository
from ..image_grid import make_grid, save_grid
from ..latents.reader import LatentReader
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import RunFolder, check_exported_pipeline, read_export, training_summary
from ..storage import MANIFEST, new_folder, sha256, write_json, write_manifest
from .folder import check_pipeline_folder
from .log import plot_loss_curve

GRID_SIZE = 16


def save_sample_grid(pipeline: LatentDiTPipeline, reader: LatentReader, steps: int, path: Path) -> None:
    """Save a grid of 16 generated images, always of the same noise and the cache's first attributes.

    Args:
        pipeline: Generates them.
        reader: Of the training images, for the attributes and the latents' shape.
        steps: Sampling steps.
        path: The PNG file; its stem is the grid's title.
    """
    noise = torch.randn((GRID_SIZE, *reader.latent_shape), generator=torch.Generator().manual_seed(0))
    (images,) = pipeline(
        reader.attributes(GRID_SIZE), GRID_SIZE, latents=noise, num_inference_steps=steps, return_dict=False
    )
    save_grid(make_grid(images, columns=8, title=path.stem, min_side=96), path)


def export(
    run: Path,
    config: Config,
    reader: LatentReader,
    pipeline: LatentDiTPipeline,
    extra: dict[str, LatentDiTTransformer2DModel],
    recipe: dict[str, Any],
) -> None:
    """Write the results of a finished run; those already exported at this step, with this sampling, are kept.

    Args:
        run: The run's folder.
        config: Its recipe.
        reader: Of the training images.
        pipeline: Of the EMA weights.
        extra: Transformers of further EMAs, by the name of their folder.
        recipe: The recipe that the card shows.

    Raises:
        FileExistsError: if `pipeline/` is not a pipeline.
        OSError: if a file cannot be written.
    """
    folder, steps = RunFolder(run), config.train.max_train_steps

    # An export that was interrupted is completed; one of another step or sampling is replaced, and counts as missing
    # until its last file is written.
    sampling = {name: getattr(config.train, name) for name in ("guidance_scale", "num_inference_steps")}
    before = _readable_export(run)
    only_missing = (before.get("step"), before.get("sampling")) == (steps, sampling)
    if not only_missing:
        folder.export.unlink(missing_ok=True)

    # A damaged pipeline is written again, but nobody else's folder.
    check_pipeline_folder(run)
    try:
        check_exported_pipeline(run)
    except ValueError:
        shutil.rmtree(folder.pipeline, ignore_errors=True)

    # In this order: the card shows the sample grid and the loss curve.
    grid = folder.sample_grid(steps)
    training = training_summary(run, config, reader, recipe, steps)
    exports: dict[Path, Callable[[], None]] = {
        grid: lambda: save_sample_grid(pipeline, reader, config.train.num_inference_steps, grid),
        folder.loss_curve: lambda: plot_loss_curve(run),
        folder.pipeline: functools.partial(_save_pretrained, pipeline, folder.pipeline),
        folder.card: lambda: write_run_card(run, pipeline, training),
    }
    for name, transformer in extra.items():
        exports[run / name] = functools.partial(_save_pretrained, transformer, run / name)
    for path, write in exports.items():
        if not (only_missing and path.exists()):
            write()

    # Last of all: with this file the run is finished.
    content = {"step": steps, "sampling": sampling, "training": training}
    if (folder.pipeline / MANIFEST).is_file():  # not of version 0.1.0
        content["pipeline_sha256"] = sha256(folder.pipeline / MANIFEST)
    write_json(folder.export, content)


def _readable_export(run: Path) -> dict[str, Any]:
    """Return the content of `export.json`; {} if it is missing or damaged, so that the run is exported again."""
    try:
        return read_export(run)
    except ValueError:
        return {}


def _save_pretrained(saved: LatentDiTPipeline | LatentDiTTransformer2DModel, folder: Path) -> None:
    with new_folder(folder) as partial:
        saved.save_pretrained(partial)
        write_manifest(partial)


def share(
    hub: BackgroundPush,
    run: Path,
    config: Config,
    reader: LatentReader,
    pipeline: LatentDiTPipeline,
    recipe: dict[str, Any],
    step: int,
) -> None:
    """Start to push the run as it is after `step` steps.

    Args:
        hub: Pushes in the background.
        run: The run's folder; its newest sample grid is the card's.
        config: Its recipe.
        reader: Of the training images.
        pipeline: Of the EMA weights.
        recipe: The recipe that the card shows.
        step: Steps done.
    """
    # The summary is of this moment; the run has no export yet from which the card could take it.
    training = training_summary(run, config, reader, recipe, step)

    # Without an example grid (`sheet=None`): the run's newest sample grid takes its place.
    def write(folder: Path) -> None:
        write_repository(
            folder,
            pipeline,
            model=str(run),
            name=hub.repo_id.rpartition("/")[2],
            source=hub.repo_id,
            training=training,
            revision=hub.revision,
            sheet=None,
        )

    hub.begin(RunFolder(run).push_queue, f"step {step}", write)
