"""The recipe of a run together with what data and machine resolved, as its checkpoints and `config.yaml` hold it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import Config
from ..latents.cache import content_sha256, earlier_contents
from ..runs import base_model, migrate_recipe
from .accelerator import effective_precision
from .checkpoint import check_same_recipe
from .step import TrainingStep


def resolved_recipe(step: TrainingStep) -> dict[str, Any]:
    """Return all that a resumed run must share with its checkpoint: the recipe and what it resolved to."""
    reader, cache = step.reader, step.reader.info["identity"]
    recipe = step.config.resume_keys()
    recipe["train"] |= {"mixed_precision": effective_precision(step.accelerator.mixed_precision, step.device)}
    # These names are keys of checkpoints on disk and do not change.
    recipe["found"] = {
        "pictures": len(reader),
        "pictures_sha256": content_sha256(reader.info),
        "crop": cache["crop"],
        "flip": cache["flip"],
        "vae_sha256": reader.info["vae_sha256"],
        "latent_shape": list(reader.latent_shape),
        "condition_values": reader.conditions,
        "optimizer": step.optimizer_name,
        "base_model": base_model(step.config),
    }
    return recipe


def resumed_recipe(step: TrainingStep, checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return the `resolved_recipe` of a run that resumes from `checkpoint`, and refuse a checkpoint of another recipe.

    Raises:
        ValueError: naming every key that differs.
    """
    before, now = migrate_recipe(state["recipe"]), resolved_recipe(step)
    # The model that the run started from: `model.init_from` may have changed since.
    now["found"]["base_model"] = before["found"].get("base_model", now["found"]["base_model"])
    # Early checkpoints of runs on a CPU say fp16, although they were computed in float32.
    before["train"]["mixed_precision"] = effective_precision(before["train"]["mixed_precision"], step.device)
    _check_not_grown(before["found"], step, checkpoint)
    check_same_recipe(before, now, checkpoint)
    return now


def _check_not_grown(found: dict[str, Any], step: TrainingStep, checkpoint: Path) -> None:
    """Refuse to resume on a cache that has grown from the checkpoint's: the order of images depends on their number.

    Raises:
        ValueError: with the way out.
    """
    if found.get("pictures_sha256") in earlier_contents(step.reader.info):
        raise ValueError(
            f"{step.config.data.latents} has grown since {checkpoint}, from {found['pictures']:,} to "
            f"{len(step.reader):,} training images, and the order of images depends on their number; resume with the "
            f"cache before, or start from this model: --model.init_from {checkpoint} and a new --train.output_dir"
        )


def resolved_config(config: Config, accelerator: Accelerator, compiled: bool) -> Config:
    """Return the recipe with what this machine resolved, such as the precision, as `config.yaml` holds it."""
    # `resume_from_checkpoint` belongs to one call: a run of the written recipe must not go back by itself.
    train = dataclasses.replace(
        config.train,
        mixed_precision=effective_precision(accelerator.mixed_precision, accelerator.device),
        torch_compile=compiled,
        resume_from_checkpoint=None,
    )
    return dataclasses.replace(config, train=train)
