"""What a run leaves for its user: sheets while it goes on, and in the end the pipeline, the curve and the card."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from ..data.reader import LatentReader
from ..data.vae import load_vae
from ..hub.background import BackgroundPush
from ..hub.card import write_run_card
from ..hub.push import write_repository
from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..sampling import EXPORT
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from ..sheets import draw_sheet, save_sheet
from ..storage import new_folder, read_manifest, write_text
from .checkpoint import as_kept_now, read_state
from .config import Config, read_config
from .initialize import Normalization, base_model
from .report import draw_loss_curve, read_log

SHEET_SIZE = 16


def build_pipeline(
    config: Config, reader: LatentReader, transformer: LatentDiTTransformer2DModel, normalization: Normalization
) -> LatentDiTPipeline:
    """The pipeline that a run samples and exports, on the transformer's device."""
    mean, std = normalization
    objective = config.objective
    pipeline = LatentDiTPipeline(
        transformer=transformer,
        scheduler=CosineLatentScheduler(
            num_train_timesteps=objective.num_train_timesteps, prediction_type=objective.prediction_type
        ),
        vae=load_vae(str(Path(config.data.latents) / "vae"), transformer.device),
        latents_mean=mean,
        latents_std=std,
        guidance_scale=config.train.guidance_scale,
        condition_labels=reader.info["condition_labels"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def checkpoint_pipeline(folder: Path) -> LatentDiTPipeline:
    """The pipeline of a checkpoint's averaged weights, on the CPU.

    Args:
        folder: The checkpoint's; the run's recipe beside it and the latent cache are needed too.

    Raises:
        ValueError: if it is damaged, or the cache is not there.
    """
    read_manifest(folder, hashes=True)
    config, state = read_config(folder.parent / "config.yaml"), read_state(folder)
    transformer = LatentDiTTransformer2DModel(**state["transformer"]).eval()
    transformer.load_state_dict(load_file(folder / "ema.safetensors"))
    return build_pipeline(config, _reader(config), transformer, state["normalization"])


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What the model card says of a checkpoint, like `facts`."""
    config, state = read_config(folder.parent / "config.yaml"), read_state(folder)
    return facts(folder.parent, config, _reader(config), as_kept_now(state["recipe"]), state["step"])


def _reader(config: Config) -> LatentReader:
    return LatentReader(config.data.latents, conditions=config.data.conditions)


def draw_samples(pipeline: LatentDiTPipeline, reader: LatentReader, steps: int, path: Path) -> None:
    """Draw a sheet: the same noise and the data's first attribute rows every time."""
    noise = torch.randn((SHEET_SIZE, *reader.latent_shape), generator=torch.Generator().manual_seed(0))
    rows = reader.attributes(SHEET_SIZE)
    (images,) = pipeline(rows, SHEET_SIZE, latents=noise, num_inference_steps=steps, return_dict=False)
    save_sheet(draw_sheet(images, columns=8, title=path.stem, min_side=96), path)


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
        reader: Its pictures.
        pipeline: Of the averaged weights.
        extra: Transformers of further averages, by the name of their folder.
        recipe: What the card shows.
    """
    steps = config.train.max_train_steps
    sheet, mark = f"samples/step-{steps}.png", run / EXPORT
    sampling = {name: getattr(config.train, name) for name in ("guidance_scale", "num_inference_steps")}
    before = json.loads(mark.read_text()) if mark.is_file() else {}
    only_missing = (before.get("step"), before.get("sampling")) == (steps, sampling)
    if not only_missing:
        mark.unlink(missing_ok=True)
    training = facts(run, config, reader, recipe, steps)
    exports: dict[str, Callable[[], None]] = {
        sheet: lambda: draw_samples(pipeline, reader, config.train.num_inference_steps, run / sheet),
        "loss_curve.png": lambda: draw_loss_curve(run),
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
    """Begin to push what the run is after `step` steps; its newest sheet is the card's."""
    training = facts(run, config, reader, recipe, step)
    shown: dict[str, Any] = {"training": training, "revision": hub.revision, "sheet": None}

    def write(folder: Path) -> None:
        write_repository(folder, pipeline, str(run), hub.repo_id.rpartition("/")[2], hub.repo_id, **shown)

    hub.begin(run / ".push", f"step {step}", write)


def facts(run: Path, config: Config, reader: LatentReader, recipe: dict[str, Any], step: int) -> dict[str, Any]:
    """What the model card says of this run after `step` steps; no path of this machine is among it."""
    rows = [row for row in read_log(run) if int(row["step"]) <= step]
    validated = [row["validation_loss"] for row in rows if row["validation_loss"] and int(row["step"]) == step]
    settings = reader.info["settings"]
    asked = {section: values for section, values in recipe.items() if section != "found"}
    asked["train"] = {"max_train_steps": config.train.max_train_steps, **asked["train"]}
    return {
        "recipe": yaml.safe_dump(asked, sort_keys=False),
        "optimizer": recipe["found"]["optimizer"],
        "pictures": reader.info["counts"]["train"],
        **{name: settings[name] for name in ("source", "crop", "resolution", "vae")},
        "columns": list(reader.info["conditions"]),
        "steps": step,
        "max_steps": config.train.max_train_steps,
        "images_seen": step * config.train.global_batch_size,
        "last_loss": float(rows[-1]["loss"]) if rows else None,
        "logging_steps": config.train.logging_steps,
        "validation_loss": float(validated[0]) if validated else None,
        "validation_images": config.train.validation_images,
        "base_model": recipe["found"].get("base_model", base_model(config)),
    }
