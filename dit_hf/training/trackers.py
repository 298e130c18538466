"""Where a run is logged beside its own files: wandb or TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import compare_versions
from PIL import Image

from ..runs import LOG, RunFolder
from ..storage import first_line, write_text


def choose_tracker(report_to: str, say: Any) -> tuple[str | None, dict[str, Any]]:
    """The tracker to use and its init options; what is missing is said once through `say`, and never asked for."""
    if report_to == "none":
        return None, {}
    if importlib.util.find_spec(report_to) is None:
        say(f"{report_to} is not installed: the run is logged to {LOG} only (pip install {report_to})")
        return None, {}
    if report_to != "wandb" or "WANDB_MODE" in os.environ:
        return report_to, {}
    import wandb

    if compare_versions("wandb", "<", "0.31"):  # whose login asks where there is none
        say(f"wandb {wandb.__version__} is too old: the run is logged to {LOG} only (pip install 'wandb>=0.31')")
        return None, {}
    try:
        reason = None if wandb.login(prompt=False) else "no wandb login"
    except wandb.Error as error:
        reason = f"wandb: {first_line(error)}"
    if reason is None:
        return report_to, {}
    say(f"{reason}: the run is logged offline (upload it later with `wandb sync`)")
    return report_to, {"mode": "offline"}


def init_options(run: Path, tracker: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What the tracker is started with; a run keeps its wandb id when it is gone on with."""
    if tracker != "wandb":
        return {}
    file = RunFolder(run).wandb_id
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8])
    kept = {"id": file.read_text(encoding="utf-8"), "resume": "allow"}
    return {"wandb": {"dir": str(run), "name": run.name, **kept, **options}}


def log_sample_grid(trackers: list[GeneralTracker], path: Path, step: int) -> None:
    """Send an image grid to the trackers that take images."""
    sheet = np.asarray(Image.open(path).convert("RGB"))[None]
    for tracker in trackers:
        if isinstance(tracker, WandBTracker):
            tracker.log_images({"samples": sheet}, step=step)
        elif isinstance(tracker, TensorBoardTracker):
            tracker.log_images({"samples": sheet}, step=step, dataformats="NHWC")
