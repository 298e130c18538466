"""What a run leaves for its user: sample grids while it trains, and at its end the pipeline, loss curve and card."""

from __future__ import annotations

import functools
import json
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
from ..runs import RunFolder, training_summary
from ..storage import new_folder, write_text
from .log import plot_loss_curve

GRID_SIZE = 16


def save_sample_grid(pipeline: LatentDiTPipeline, reader: LatentReader, steps: int, path: Path) -> None:
    """Draw an image grid: the same noise and the data's first attribute rows every time."""
    noise = torch.randn((GRID_SIZE, *reader.latent_shape), generator=torch.Generator().manual_seed(0))
    rows = reader.attributes(GRID_SIZE)
    (images,) = pipeline(rows, GRID_SIZE, latents=noise, num_inference_steps=steps, return_dict=False)
    save_grid(make_grid(images, columns=8, title=path.stem, min_side=96), path)


def export(
    run: Path,
    config: Config,
    reader: LatentReader,
    pipeline: LatentDiTPipeline,
    extra: dict[str, LatentDiTTransformer2DModel],
    recipe: dict[str, Any],
) -> None:
    """Write what a finished run leaves; what was written of this very step, sampled likewise, is left as it is.

    Args:
        run: The run's folder.
        config: Its recipe.
        reader: Its images.
        pipeline: Of the averaged weights.
        extra: Transformers of further averages, by the name of their folder.
        recipe: What the card shows.
    """
    steps = config.train.max_train_steps
    sheet, mark = f"samples/step-{steps}.png", RunFolder(run).export
    sampling = {name: getattr(config.train, name) for name in ("guidance_scale", "num_inference_steps")}
    before = json.loads(mark.read_text()) if mark.is_file() else {}
    only_missing = (before.get("step"), before.get("sampling")) == (steps, sampling)
    if not only_missing:
        mark.unlink(missing_ok=True)
    training = training_summary(run, config, reader, recipe, steps)
    exports: dict[str, Callable[[], None]] = {
        sheet: lambda: save_sample_grid(pipeline, reader, config.train.num_inference_steps, run / sheet),
        "loss_curve.png": lambda: plot_loss_curve(run),
        "pipeline": functools.partial(_save_pretrained, pipeline, run / "pipeline"),
        "README.md": lambda: write_run_card(run, pipeline, training),
    }
    for name, transformer in extra.items():
        exports[name] = functools.partial(_save_pretrained, transformer, run / name)
    for name, write in exports.items():
        if not (only_missing and (run / name).exists()):
            write()
    write_text(mark, json.dumps({"step": steps, "sampling": sampling, "training": training}, indent=2) + "\n")


def _save_pretrained(saved: LatentDiTPipeline | LatentDiTTransformer2DModel, folder: Path) -> None:
    with new_folder(folder) as partial:
        saved.save_pretrained(partial)


def share(
    hub: BackgroundPush,
    run: Path,
    config: Config,
    reader: LatentReader,
    pipeline: LatentDiTPipeline,
    recipe: dict[str, Any],
    step: int,
) -> None:
    """Begin to push what the run is after `step` steps; its newest image grid is the card's."""
    training = training_summary(run, config, reader, recipe, step)
    shown: dict[str, Any] = {"training": training, "revision": hub.revision, "sheet": None}

    def write(folder: Path) -> None:
        write_repository(folder, pipeline, str(run), hub.repo_id.rpartition("/")[2], hub.repo_id, **shown)

    hub.begin(RunFolder(run).push_queue, f"step {step}", write)
