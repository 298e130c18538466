"""A run's folder: the names and contents of its files, and the pipeline of what commands call MODEL.

Runs are read here only. Checkpoints are written by `training/checkpoint.py`, the log by `training/log.py`, and the
export by `training/export.py`.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline

from .config import Config, ObjectiveConfig
from .data.files import CACHE_INFO
from .devices import default_device
from .hub_ids import reading_problem, split_revision
from .latents.cache import load_cache_vae
from .latents.reader import LatentReader
from .latents.vae import check_weights
from .models.transformer_latent_dit import LatentDiTTransformer2DModel
from .pipelines.pipeline_latent_dit import LatentDiTPipeline
from .recipe_file import read_config, read_recipe
from .schedulers.scheduling_cosine_latent import CosineLatentScheduler, named_betas
from .storage import (
    MANIFEST,
    first_line,
    nearest_folder,
    read_json,
    read_manifest,
    read_tensors,
    sha256,
    temporary_folder,
)

Normalization = tuple[list[float], list[float]]  # mean and standard deviation of the latents by channel

# Files of a checkpoint: its state, the weights in training, the EMA weights (further EMAs are
# `ema-<decay>.safetensors`), and the optimizer's moments and settings.
STATE = "state.json"
WEIGHTS, EMA_WEIGHTS = "transformer.safetensors", "ema.safetensors"
OPTIMIZER_STATE, OPTIMIZER_GROUPS = "optimizer.safetensors", "optimizer.json"
FORMAT_VERSION = 2
# Files of an evaluation, in the folder `evaluation/`.
EVALUATION_REPORT, EVALUATION_PLOT, SETTINGS_PLOT = "evaluation.json", "evaluation.png", "settings.png"
# Files of a run's folder that have the same names in the repository to which `dit-hf push` uploads it.
CONFIG, LOG, EXPORT, CARD, LOSS_CURVE = "config.yaml", "training_log.csv", "export.json", "README.md", "loss_curve.png"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_GRID = re.compile(r"step-(\d+)\.png")
# The last key of a `config.yaml`, in all versions so far: without it the file has been cut.
_LAST_KEY = ("train", "hub_revision")
# What every summary in an export.json holds.
_SUMMARY = (
    *("recipe", "optimizer", "pictures", "source", "crop", "resolution", "vae", "columns", "steps", "max_steps"),
    *("images_seen", "last_loss", "logging_steps", "validation_loss", "validation_images"),
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run's folder `path`, existing or not."""

    path: Path

    @property
    def config(self) -> Path:
        """The recipe, with what the machine resolved."""
        return self.path / CONFIG

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def loss_curve(self) -> Path:
        return self.path / LOSS_CURVE

    @property
    def best(self) -> Path:
        """The checkpoints with the lowest validation losses, as JSON."""
        return self.path / "best.json"

    @property
    def pipeline(self) -> Path:
        """The exported pipeline of the EMA weights."""
        return self.path / "pipeline"

    @property
    def export(self) -> Path:
        """Step, sampling and summary of the last export, as JSON; written last: without it a run is not finished."""
        return self.path / EXPORT

    @property
    def card(self) -> Path:
        return self.path / CARD

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def lock(self) -> Path:
        """The lock of the process that trains."""
        return self.path / ".lock"

    @property
    def push_queue(self) -> Path:
        """The folder in which a background push is prepared."""
        return self.path / ".push"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    @property
    def trackio(self) -> Path:
        return self.path / "trackio"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Return the existing checkpoints, in the order of their steps."""
        # Not those of interrupted saves, whose names differ, nor other folders that merely start alike.
        folders = [path for path in self.path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
        return sorted(folders, key=checkpoint_step)

    def sample_grid(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step}.png"

    def sample_grids(self) -> dict[int, Path]:
        """Return the existing sample grids by step, earliest first."""
        found = [(_GRID.fullmatch(path.name), path) for path in self.path.glob("samples/step-*.png")]
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    @property
    def branch(self) -> Path:
        """Log and sample grids of a run that went back to an earlier checkpoint, until it saves its first own one."""
        return self.path / ".branch"

    def card_images(self) -> dict[str, Any]:
        """Return the newest sample grid and the loss curve, if they exist, as options of `write_card`.

        Paths are relative to the run's folder, in which the card is.
        """
        grids = [*self.sample_grids().values()]
        images: dict[str, Any] = {"sheet": f"samples/{grids[-1].name}"} if grids else {}
        return images | ({"curve": LOSS_CURVE} if self.loss_curve.is_file() else {})


def find_run(model: str) -> Path | None:
    """Return the run's folder if `model` is one, or is the pipeline or a checkpoint in one; None otherwise."""
    # A config.yaml alone is not enough: other tools write one, too.
    for folder in (Path(model), Path(model).absolute().parent):
        if RunFolder(folder).config.is_file() and RunFolder(folder).log.is_file():
            return folder
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps after which a checkpoint was saved, from its folder's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_checkpoint(model: str) -> bool:
    """Check whether `model` is the folder of a checkpoint."""
    return (Path(model) / STATE).is_file()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state of a checkpoint: step, recipe, the transformer's config, normalization, losses.

    Raises:
        ValueError: if it is damaged, or another version of dit_hf wrote it.
    """
    state = read_json(checkpoint / STATE)
    if state.get("format") != FORMAT_VERSION:
        raise ValueError(f"{checkpoint} was written by another version of dit_hf; begin a new run")
    for key, kind in (("step", int), ("recipe", dict), ("transformer", dict)):
        if not isinstance(state.get(key, kind()), kind):
            raise ValueError(f"{checkpoint / STATE} is damaged ({key} is no {kind.__name__}); delete this checkpoint")
    return state


def migrate_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's recipe in today's layout, with the resolved values in a section `found`.

    Early checkpoints kept them among the requested options.
    """
    if "found" in recipe:
        return recipe

    # What the cache resolved stood in the section `data`, and under `optimizer` the name of the one that was built.
    names = ("pictures", "vae_sha256", "latent_shape", "condition_values")
    data, optim = {**recipe["data"]}, {**recipe["optim"]}
    resolved = {name: data.pop(name, None) for name in names} | {"optimizer": optim["optimizer"]}
    optim["optimizer"] = "muon" if resolved["optimizer"].startswith("Muon") else "adamw"
    return {**recipe, "data": data, "optim": optim, "found": resolved}


def read_run_config(run: Path) -> Config:
    """Read the recipe in a run's folder.

    Paths in it may be relative to the folder in which the run was started. Where it is read from another one, that
    folder is found by the recipe's own `train.output_dir`.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    path = RunFolder(run).config
    section, key = _LAST_KEY
    if key not in read_recipe(path).get(section, {}):
        raise ValueError(
            f"{path} has been cut: its last key, {section}.{key}, is missing; dit-hf train --config RECIPE "
            f"--train.output_dir {run} --train.resume_from_checkpoint latest writes it again"
        )
    config = read_config(path)
    latents, output_dir = Path(config.data.latents), Path(config.train.output_dir)
    started_in = run.resolve()
    for part in reversed(output_dir.parts):
        if started_in.name != part:
            return config
        started_in = started_in.parent
    if not latents.exists() and not output_dir.is_absolute() and (started_in / latents).exists():
        config.data.latents = str(started_in / latents)
    return config


def read_log(run: Path) -> list[dict[str, str]]:
    """Read the rows of a run's log, as text by column; [] without a log.

    A last row that a kill cut short is left out.

    Raises:
        ValueError: naming the file, if it is not a log that a run has written, or a spreadsheet has changed it.
    """
    log = RunFolder(run).log
    if not log.is_file():
        return []
    try:
        text = log.read_text(encoding="utf-8-sig")
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        # csv marks missing values by None as the value, and surplus ones by None as the key.
        whole = [row for row in rows if None not in row.values() and None not in row]
        if text and (rows.fieldnames is None or not {"step", "loss"} <= {*rows.fieldnames}):
            raise ValueError("no columns step and loss")
        for row in whole:
            int(row["step"])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{log} cannot be read as the log of a run ({first_line(error)}); move it away") from error
    return whole


def load_pipeline(model: str, device: str | torch.device | None = None, **options: Any) -> LatentDiTPipeline:
    """Load a pipeline from a run's folder, a checkpoint, a pipeline's folder or the Hub.

    Args:
        model: A run's folder (its exported `pipeline/` is loaded), a checkpoint (with its EMA weights), a pipeline's
            folder, or a Hub id, which may name a revision (`OWNER/NAME@REVISION`: a branch, tag, commit, `refs/pr/1`).
        device: Where to load it; None is the accelerator, if there is one.
        options: Options of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: if no [`LatentDiTPipeline`] can be loaded from there.
    """
    check_model(model)
    run = RunFolder(Path(model))

    # A checkpoint: saved to a folder first, so that `options` mean the same as for a saved pipeline.
    if is_checkpoint(model):
        with temporary_folder("checkpoint") as saved:
            checkpoint_pipeline(Path(model)).save_pretrained(saved)
            return load_pipeline(str(saved), device, **options)

    # A run must be finished: one that is being trained for more steps still has the pipeline of its earlier end, but
    # no export.json. A repository that `dit-hf push` wrote has a run's log and config too, and is a pipeline itself.
    exported = (run.path / "model_index.json").is_file()
    finished = run.pipeline.is_dir() and run.export.is_file()
    if not exported and not finished and find_run(model) == run.path:
        names = ", ".join(str(checkpoint) for checkpoint in run.checkpoints())
        there = f"name one of its checkpoints ({names})" if names else "it has no checkpoint yet"
        raise ValueError(f"{model}: the run is not finished; {there}")
    if not exported:
        check_exported_pipeline(run.path)

    # Everything that can go wrong becomes one line: no such folder, no network, a damaged file, each with an exception
    # of its own. The Hub is asked first, because diffusers prints what it answers and then speaks of local files.
    repo_id, revision = split_revision(model)
    problem = None if run.path.exists() else reading_problem(repo_id, revision, "model_index.json")
    try:
        folder = str(run.pipeline) if run.pipeline.is_dir() else repo_id
        place = {"revision": revision, "local_files_only": problem is not None}
        pipeline = DiffusionPipeline.from_pretrained(folder, **options, **place)
        for component in (pipeline.components.get("transformer"), pipeline.components.get("vae")):
            if isinstance(component, torch.nn.Module):
                check_weights(component)
    except Exception as error:
        if problem:
            raise ValueError(f"{model}: {problem}") from error
        raise ValueError(f"{model}: no pipeline could be loaded from there ({first_line(error)})") from error
    if not isinstance(pipeline, LatentDiTPipeline):
        raise ValueError(f"{model}: expected a LatentDiTPipeline, got {type(pipeline).__name__}")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device or default_device())
    return pipeline


def _looks_like_model(folder: Path) -> bool:
    """Check for a file or folder that a run, a checkpoint or a pipeline has, and a latent cache has not."""
    names = ("model_index.json", STATE, CONFIG, RunFolder(folder).pipeline.name)
    return any((folder / name).exists() for name in names) and not (folder / CACHE_INFO).exists()


def check_model(model: str) -> None:
    """Refuse a MODEL that is certainly none, without asking the Hub.

    Raises:
        ValueError: naming what there is instead.
    """
    path = Path(model)
    if (path / CACHE_INFO).is_file():
        raise ValueError(
            f"{model} is a latent cache, not a model: dit-hf train celeba --data.latents {model} trains one"
        )
    if path.is_file():
        raise ValueError(f"{model} is a file; a model is the folder of a run, a checkpoint or a pipeline, or a Hub id")
    if path.is_dir() and not _looks_like_model(path):
        inside = sorted(entry for entry in path.iterdir() if _looks_like_model(entry))
        advice = f"; did you mean {inside[0]}?" if inside else ""
        raise ValueError(f"{model} is a folder, but neither of a run, nor of a checkpoint, nor of a pipeline{advice}")
    if path.exists():
        return

    # On the Hub a model is OWNER/NAME. What begins like an existing folder, or has more or fewer parts, is a path.
    parts = Path(split_revision(model)[0]).parts
    local = path.is_absolute() or model.startswith((".", "~")) or len(parts) != 2 or Path(parts[0]).is_dir()
    if not local:
        return
    checkpoints = [checkpoint.name for checkpoint in RunFolder(path.parent).checkpoints()]
    if path.name.startswith("checkpoint-") and path.parent.is_dir():
        there = f"its checkpoints are {', '.join(checkpoints)}" if checkpoints else f"{path.parent} has no checkpoints"
    else:
        near = nearest_folder(path)
        there = f"did you mean {near}?" if near else "a model on the Hub is OWNER/NAME"
    raise ValueError(f"{model}: no such folder; {there}")


def checkpoint_pipeline(checkpoint: Path) -> LatentDiTPipeline:
    """Build the pipeline of a checkpoint's EMA weights, on the CPU.

    Args:
        checkpoint: Its folder, inside the run's, whose recipe is read; so is the latent cache that this names.

    Raises:
        ValueError: if the checkpoint is damaged, or the cache does not exist.
    """
    read_manifest(checkpoint, hashes=True)
    config, state = read_run_config(checkpoint.parent), read_state(checkpoint)
    transformer = LatentDiTTransformer2DModel(**state["transformer"]).eval()
    transformer.load_state_dict(read_tensors(checkpoint / EMA_WEIGHTS, "name an earlier checkpoint"))
    return build_pipeline(config, _open_reader(config), transformer, state["normalization"])


def build_pipeline(
    config: Config, reader: LatentReader, transformer: LatentDiTTransformer2DModel, normalization: Normalization
) -> LatentDiTPipeline:
    """Build the pipeline with which a run samples, and which it exports, on the transformer's device.

    Args:
        config: The recipe.
        reader: Of the training images.
        transformer: With the weights to sample with.
        normalization: Mean and standard deviation by channel of the latents.
    """
    mean, std = normalization
    pipeline = LatentDiTPipeline(
        transformer=transformer,
        scheduler=build_scheduler(config.objective),
        vae=load_cache_vae(config.data.latents, transformer.device),
        latents_mean=mean,
        latents_std=std,
        guidance_scale=config.train.guidance_scale,
        condition_labels=reader.info["condition_labels"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_scheduler(objective: ObjectiveConfig) -> CosineLatentScheduler:
    """Build the scheduler of a recipe's objective."""
    timesteps = objective.num_train_timesteps
    betas = named_betas(objective.beta_schedule, timesteps)
    return CosineLatentScheduler(timesteps, prediction_type=objective.prediction_type, trained_betas=betas)


def _open_reader(config: Config) -> LatentReader:
    return LatentReader(config.data.latents, conditions=config.data.conditions)


def base_model(config: Config) -> str | None:
    """Return the model that a run is initialized from: its Hub id, or the name of its folder; None without one."""
    # Without the path: model cards contain no path of this machine.
    base = config.model.init_from
    return Path(base).name if base and Path(base).exists() else base


def checkpoint_summary(checkpoint: Path) -> dict[str, Any]:
    """Return the `training_summary` of a run at one of its checkpoints."""
    config, state = read_run_config(checkpoint.parent), read_state(checkpoint)
    return training_summary(
        checkpoint.parent, config, _open_reader(config), migrate_recipe(state["recipe"]), state["step"]
    )


def read_export(run: Path) -> dict[str, Any]:
    """Read `export.json` of an exported run or a pushed repository; {} if there is none.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    path = RunFolder(run).export
    if not path.is_file():
        return {}
    remedy = "delete it, and train with --train.resume_from_checkpoint latest exports the run again"
    content = read_json(path, remedy)
    summary = content.get("training", {})
    missing = [key for key in _SUMMARY if key not in summary] if isinstance(summary, dict) else ["training"]
    if summary and missing:
        raise ValueError(f"{path} is damaged (no {', '.join(missing[:3])}); {remedy}")
    return content


def exported_summary(folder: Path) -> dict[str, Any]:
    """Return the `training_summary` in `folder`, an exported run or a pushed repository; {} if there is none."""
    return read_export(folder).get("training", {})


def check_exported_pipeline(run: Path) -> None:
    """Check that `pipeline/` has the very bytes that the run exported; those of version 0.1.0 have no manifest.

    Raises:
        ValueError: naming the file that differs.
    """
    folder, expected = RunFolder(run).pipeline, read_export(run).get("pipeline_sha256")
    if expected is None:
        return
    remedy = f"train with --train.resume_from_checkpoint latest exports it again from the last checkpoint of {run}"
    try:
        read_manifest(folder, hashes=True)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if sha256(folder / MANIFEST) != expected:
        raise ValueError(f"{folder} is not the pipeline that {run} exported; {remedy}")


def training_summary(
    run: Path, config: Config, reader: LatentReader, recipe: dict[str, Any], step: int
) -> dict[str, Any]:
    """Summarize a run after `step` steps for its model card, without any path of this machine.

    Args:
        run: The run's folder.
        config: Its recipe.
        reader: Of the training images.
        recipe: As checkpoints hold it, with a section `found`.
        step: Optimizer steps done.
    """
    # Only what belongs to these weights: no later rows, and a validation loss of this very step.
    rows = [row for row in read_log(run) if int(row["step"]) <= step]
    validated = [row["validation_loss"] for row in rows if row["validation_loss"] and int(row["step"]) == step]
    settings = reader.info["settings"]
    requested = {section: values for section, values in recipe.items() if section != "found"}
    # Not among the keys that a resumed run must keep, but part of what was trained.
    requested["train"] = {"max_train_steps": config.train.max_train_steps, **requested["train"]}

    # Keys are those of export.json and of the card's template.
    return {
        "recipe": yaml.safe_dump(requested, sort_keys=False),
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
