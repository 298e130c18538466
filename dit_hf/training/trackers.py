"""Trackers that log a run beside its own files: wandb or TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import compare_versions
from PIL import Image

from ..runs import LOG, RunFolder
from ..storage import first_line, write_text


def choose_tracker(report_to: str, log: Callable[[str], None]) -> tuple[str | None, dict[str, Any]]:
    """Choose the tracker of a run and its init options, without ever prompting for a login.

    Args:
        report_to: `wandb`, `tensorboard` or `none`.
        log: Receives a line if the tracker is not installed, too old or offline.

    Returns:
        The tracker's name, None if the run is logged to its own files only, and its init options.
    """
    if report_to == "none":
        return None, {}
    if importlib.util.find_spec(report_to) is None:
        log(f"{report_to} is not installed: the run is logged to {LOG} only (pip install {report_to})")
        return None, {}
    # TensorBoard needs no login; with WANDB_MODE the user has decided already.
    if report_to != "wandb" or "WANDB_MODE" in os.environ:
        return report_to, {}

    # Earlier versions prompt even with `prompt=False`, which would stop a run that nobody watches.
    import wandb

    if compare_versions("wandb", "<", "0.31"):
        log(f"wandb {wandb.__version__} is too old: the run is logged to {LOG} only (pip install 'wandb>=0.31')")
        return None, {}

    # Without a login the run is logged offline.
    try:
        reason = None if wandb.login(prompt=False) else "no wandb login"
    except wandb.Error as error:
        reason = f"wandb: {first_line(error)}"
    if reason is None:
        return report_to, {}
    log(f"{reason}: the run is logged offline (upload it later with `wandb sync`)")
    return report_to, {"mode": "offline"}


def start_tracker(
    accelerator: Accelerator, run: Path, tracker: str | None, options: dict[str, Any], recipe: dict[str, Any]
) -> None:
    """Start the tracker on the first rank, with the recipe as its config.

    Args:
        accelerator: Of the run.
        run: The run's folder.
        tracker: The tracker's name; None is none.
        options: Its init options, from `choose_tracker`.
        recipe: Values by section.
    """
    if not accelerator.is_main_process:
        return
    flat = {f"{section}.{key}": value for section, values in recipe.items() for key, value in values.items()}
    # TensorBoard's hyperparameters take no other types.
    simple = {name: v if isinstance(v, int | float | str | bool) else str(v) for name, v in flat.items()}
    init_kwargs = {"wandb": {**_wandb_run(run), **options}} if tracker == "wandb" else {}
    accelerator.init_trackers("dit_hf", config=simple, init_kwargs=init_kwargs)


def _wandb_run(run: Path) -> dict[str, Any]:
    """Return the options of `wandb.init` for a run, with the id that a resumed run keeps."""
    file = RunFolder(run).wandb_id
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8])
    # "allow" continues the run of that id, or starts it where wandb has none (offline, or deleted).
    return {"dir": str(run), "name": run.name, "id": file.read_text(encoding="utf-8"), "resume": "allow"}


def log_sample_grid(trackers: list[GeneralTracker], path: Path, step: int) -> None:
    """Send an image grid to the trackers that take images."""
    # A batch of one. TensorBoard expects channels first by default.
    grid = np.asarray(Image.open(path).convert("RGB"))[None]  # uint8 [1, height, width, 3]
    for tracker in trackers:
        if isinstance(tracker, WandBTracker):
            tracker.log_images({"samples": grid}, step=step)
        elif isinstance(tracker, TensorBoardTracker):
            tracker.log_images({"samples": grid}, step=step, dataformats="NHWC")
