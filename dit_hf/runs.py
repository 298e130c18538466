"""A run's folder: the name of every file in it, what the files hold, and the way from MODEL to a pipeline.

Reading a run is done here alone. Checkpoints are written by `training/checkpoint.py`, the log by `training/log.py`,
and the export by `training/export.py`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from .config import Config, ObjectiveConfig, read_config
from .devices import default_device
from .latents.reader import LatentReader
from .latents.vae import load_vae
from .models.transformer_latent_dit import LatentDiTTransformer2DModel
from .pipelines.pipeline_latent_dit import LatentDiTPipeline
from .schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .storage import first_line, read_manifest

Normalization = tuple[list[float], list[float]]  # mean and standard deviation of the latents by channel

# Of a checkpoint: its state, the weights in training, those of the EMA (further ones are `ema-<decay>.safetensors`),
# and the optimizer's moments and settings.
STATE = "state.json"
WEIGHTS, EMA_WEIGHTS = "transformer.safetensors", "ema.safetensors"
OPTIMIZER_STATE, OPTIMIZER_GROUPS = "optimizer.safetensors", "optimizer.json"
FORMAT_VERSION = 2
# Of an evaluation, in a folder `evaluation/`.
EVALUATION_REPORT, EVALUATION_PLOT, SETTINGS_PLOT = "evaluation.json", "evaluation.png", "settings.png"
# In a run's folder and in what `dit-hf push` makes of it alike.
CONFIG, LOG, EXPORT, CARD, LOSS_CURVE = "config.yaml", "training_log.csv", "export.json", "README.md", "loss_curve.png"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """The files of a run's folder `path`, whether they are there or not."""

    path: Path

    @property
    def config(self) -> Path:
        """The recipe as it was resolved."""
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
        """The exported pipeline, of the EMA's weights."""
        return self.path / "pipeline"

    @property
    def export(self) -> Path:
        """What the last export was of; written last, so that a run without it is not finished."""
        return self.path / EXPORT

    @property
    def card(self) -> Path:
        return self.path / CARD

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def lock(self) -> Path:
        """Held by the process that trains."""
        return self.path / ".lock"

    @property
    def push_queue(self) -> Path:
        """Where a push in the background is prepared."""
        return self.path / ".push"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        folders = [path for path in self.path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
        return sorted(folders, key=checkpoint_step)

    def sample_grid(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step}.png"

    def sample_grids(self) -> dict[int, Path]:
        """The sample grids that are there, by step, earliest first."""
        steps = {int(path.stem.removeprefix("step-")): path for path in self.path.glob("samples/step-*.png")}
        return dict(sorted(steps.items()))

    def card_images(self) -> dict[str, Any]:
        """The newest sample grid and the loss curve, as far as they are there, as `write_card` takes them."""
        grids = [*self.sample_grids().values()]
        images: dict[str, Any] = {"sheet": f"samples/{grids[-1].name}"} if grids else {}
        return images | ({"curve": LOSS_CURVE} if self.loss_curve.is_file() else {})


def find_run(model: str) -> Path | None:
    """The run's folder that `model` is, or whose `pipeline/` or checkpoint it is; None if it is none of these."""
    for folder in (Path(model), Path(model).absolute().parent):
        if RunFolder(folder).config.is_file() and RunFolder(folder).log.is_file():
            return folder
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_checkpoint(model: str) -> bool:
    """Whether it is the folder of a run's checkpoint."""
    return (Path(model) / STATE).is_file()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state of a checkpoint: step, recipe, the transformer's config, normalization, losses.

    Raises:
        ValueError: if another version of dit_hf wrote it.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT_VERSION:
        raise ValueError(f"{checkpoint} was written by another version of dit_hf; begin a new run")
    return state


def migrate_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's recipe as it is kept today: early ones mixed what was resolved with what was requested."""
    if "found" in recipe:
        return recipe
    names = ("pictures", "vae_sha256", "latent_shape", "condition_values")
    data, optim = {**recipe["data"]}, {**recipe["optim"]}
    resolved = {name: data.pop(name, None) for name in names} | {"optimizer": optim["optimizer"]}
    optim["optimizer"] = "muon" if resolved["optimizer"].startswith("Muon") else "adamw"
    return {**recipe, "data": data, "optim": optim, "found": resolved}


def read_log(run: Path) -> list[dict[str, str]]:
    """The whole rows of a run's log; a last row cut short by a kill is not one."""
    log = RunFolder(run).log
    if not log.is_file():
        return []
    text = log.read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in rows if None not in row.values() and None not in row]


def load_pipeline(model: str, device: str | torch.device | None = None, **options: Any) -> LatentDiTPipeline:
    """Load the pipeline of a run's or a checkpoint's folder, of a pipeline's folder, or of a Hub id.

    Args:
        model: The folder of a run (its `pipeline/` is taken), of one of its checkpoints (its EMA's weights are) or of
            a pipeline, or an id of the Hub.
        device: Where it goes; None is the accelerator where there is one.
        options: Of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: if no [`LatentDiTPipeline`] can be loaded from there.
    """
    run = RunFolder(Path(model))
    if is_checkpoint(model):
        # Through a folder, so that `options` mean what they mean for a saved pipeline.
        with tempfile.TemporaryDirectory(prefix="dit_hf-checkpoint-") as saved:
            checkpoint_pipeline(Path(model)).save_pretrained(saved)
            return load_pipeline(saved, device, **options)
    exported = (run.path / "model_index.json").is_file()  # what `dit-hf push` writes of a run has its log, too
    finished = run.pipeline.is_dir() and run.export.is_file()  # which a run that is made longer loses
    if not exported and not finished and find_run(model) == run.path:
        raise ValueError(f"{model}: the run is not finished; name one of its checkpoints ({model}/checkpoint-...)")
    try:
        folder = str(run.pipeline) if run.pipeline.is_dir() else model
        pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    except Exception as error:  # no such folder, no network, a damaged file: each raises its own
        raise ValueError(f"{model}: no pipeline could be loaded from there ({first_line(error)})") from error
    if not isinstance(pipeline, LatentDiTPipeline):
        raise ValueError(f"{model}: expected a LatentDiTPipeline, got {type(pipeline).__name__}")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device or default_device())
    return pipeline


def checkpoint_pipeline(checkpoint: Path) -> LatentDiTPipeline:
    """Build the pipeline of a checkpoint's EMA weights, on the CPU.

    Args:
        checkpoint: Its folder; the run's recipe beside it and the latent cache are needed too.

    Raises:
        ValueError: if it is damaged, or the cache is not there.
    """
    read_manifest(checkpoint, hashes=True)
    config, state = read_config(RunFolder(checkpoint.parent).config), read_state(checkpoint)
    transformer = LatentDiTTransformer2DModel(**state["transformer"]).eval()
    transformer.load_state_dict(load_file(checkpoint / EMA_WEIGHTS))
    return build_pipeline(config, _open_reader(config), transformer, state["normalization"])


def build_pipeline(
    config: Config, reader: LatentReader, transformer: LatentDiTTransformer2DModel, normalization: Normalization
) -> LatentDiTPipeline:
    """Build the pipeline that a run samples and exports, on the transformer's device."""
    mean, std = normalization
    pipeline = LatentDiTPipeline(
        transformer=transformer,
        scheduler=build_scheduler(config.objective),
        vae=load_vae(str(Path(config.data.latents) / "vae"), transformer.device),
        latents_mean=mean,
        latents_std=std,
        guidance_scale=config.train.guidance_scale,
        condition_labels=reader.info["condition_labels"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_scheduler(objective: ObjectiveConfig) -> CosineLatentScheduler:
    """Build the scheduler of a recipe's objective."""
    return CosineLatentScheduler(objective.num_train_timesteps, prediction_type=objective.prediction_type)


def _open_reader(config: Config) -> LatentReader:
    return LatentReader(config.data.latents, conditions=config.data.conditions)


def base_model(config: Config) -> str | None:
    """Name the model that a run is initialized from: its Hub id, or the name of its folder without the path."""
    base = config.model.init_from
    return Path(base).name if base and Path(base).exists() else base


def checkpoint_summary(checkpoint: Path) -> dict[str, Any]:
    """The `training_summary` of a run at one of its checkpoints."""
    config, state = read_config(RunFolder(checkpoint.parent).config), read_state(checkpoint)
    return training_summary(
        checkpoint.parent, config, _open_reader(config), migrate_recipe(state["recipe"]), state["step"]
    )


def exported_summary(folder: Path) -> dict[str, Any]:
    """The `training_summary` that the export of a run, or a push of it, has written down; {} if there is none."""
    export = folder / EXPORT
    return json.loads(export.read_text(encoding="utf-8")).get("training", {}) if export.is_file() else {}


def training_summary(
    run: Path, config: Config, reader: LatentReader, recipe: dict[str, Any], step: int
) -> dict[str, Any]:
    """Sum up a run after `step` steps for its model card; no path of this machine is in it."""
    rows = [row for row in read_log(run) if int(row["step"]) <= step]
    validated = [row["validation_loss"] for row in rows if row["validation_loss"] and int(row["step"]) == step]
    settings = reader.info["settings"]
    requested = {section: values for section, values in recipe.items() if section != "found"}
    requested["train"] = {"max_train_steps": config.train.max_train_steps, **requested["train"]}
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
