"""Trackers that log a run beside its own files: wandb, TensorBoard or trackio. They never end a training."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from accelerate.utils import compare_versions
from PIL import Image

from ..runs import LOG, RunFolder
from ..storage import first_line, write_text

Log = Callable[[str], None]


def choose_tracker(report_to: str, log: Log) -> tuple[str | None, dict[str, Any]]:
    """Choose the tracker of a run and its init options, without ever prompting for a login.

    Args:
        report_to: `wandb`, `tensorboard`, `trackio` or `none`.
        log: Receives a line if the tracker is not installed, too old, switched off or offline.

    Returns:
        The tracker's name, None if the run is logged to its own files only, and its init options.
    """
    if report_to == "none":
        return None, {}
    # A folder of that name in the current one is found as a package too, but has no file.
    found = importlib.util.find_spec(report_to)
    if found is None or found.origin is None:
        log(f"{report_to} is not installed: the run is logged to {LOG} only (pip install {report_to})")
        return None, {}
    if report_to != "wandb":
        return report_to, {}

    # Switched off, as wandb or as transformers spells it.
    mode = os.environ.get("WANDB_MODE", "").lower()
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    if mode == "disabled" or disabled:
        name = "WANDB_DISABLED is set" if disabled else "WANDB_MODE is disabled"
        log(f"{name}: the run is logged to {LOG} only")
        return None, {}

    # Earlier versions prompt even with `prompt=False`, which would stop a run that nobody watches.
    import wandb

    if compare_versions("wandb", "<", "0.31"):
        log(f"wandb {wandb.__version__} is too old: the run is logged to {LOG} only (pip install 'wandb>=0.31')")
        return None, {}
    if mode in ("offline", "dryrun"):
        return report_to, {}

    # Without a login, or a server that accepts it, the run is logged offline.
    try:
        reason = None if wandb.login(prompt=False) else "no wandb login"
    except wandb.Error as error:
        reason = f"wandb: {first_line(error)}"
    if reason is None:
        return report_to, {}
    log(f"{reason}: the run is logged offline (upload it later with `wandb sync`)")
    return report_to, {"mode": "offline"}


def is_online(tracker: str | None, options: dict[str, Any]) -> bool:
    """Check whether a tracker, chosen by `choose_tracker` with its init options, sends what it logs to a server."""
    if tracker == "trackio":
        return any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
    mode = options.get("mode") or os.environ.get("WANDB_MODE", "").lower()
    return tracker == "wandb" and mode not in ("offline", "dryrun")


def start_tracker(
    accelerator: Accelerator,
    run: Path,
    tracker: str,
    options: dict[str, Any],
    recipe: dict[str, Any],
    step: int,
    log: Log,
) -> None:
    """Start the tracker on the first rank, with the recipe as its config.

    Args:
        accelerator: Of the run.
        run: The run's folder.
        tracker: The tracker's name.
        options: Its init options, from `choose_tracker`.
        recipe: Values by section.
        step: Steps done; what TensorBoard has of later ones is hidden.
        log: Receives a line if the tracker fails.
    """
    if not accelerator.is_main_process:
        return
    flat = {f"{section}.{key}": value for section, values in recipe.items() for key, value in values.items()}
    # TensorBoard's hyperparameters take no other types.
    simple = {name: v if isinstance(v, int | float | str | bool) else str(v) for name, v in flat.items()}
    project = "dit_hf"
    with _never_fatal(accelerator, log):
        if tracker == "wandb":
            options = {**_wandb_run(run, log), **options}
            project = os.environ.get("WANDB_PROJECT", project)
        elif tracker == "trackio":
            options = {**_trackio_run(run), **options}
        elif step:
            options = {"purge_step": step + 1}
        with _quiet(tracker):
            accelerator.init_trackers(project, config=simple, init_kwargs={tracker: options})


def log_row(accelerator: Accelerator, row: dict[str, Any], log: Log) -> None:
    """Send a row of the log to the tracker."""
    values = {name: value for name, value in row.items() if name != "step" and value is not None}
    with _never_fatal(accelerator, log):
        accelerator.log(values, step=row["step"])


def log_sample_grid(accelerator: Accelerator, path: Path, step: int, log: Log) -> None:
    """Send an image grid to the trackers that take images."""
    # A batch of one. TensorBoard expects channels first by default.
    grid = np.asarray(Image.open(path).convert("RGB"))[None]  # uint8 [1, height, width, 3]
    with _never_fatal(accelerator, log):
        for tracker in accelerator.trackers:
            if isinstance(tracker, WandBTracker):
                tracker.log_images({"samples": grid}, step=step)
            elif isinstance(tracker, TensorBoardTracker):
                tracker.log_images({"samples": grid}, step=step, dataformats="NHWC")
            elif isinstance(tracker, TrackioTracker):
                import trackio

                tracker.log({"samples": trackio.Image(grid[0])}, step=step)


def end_trackers(accelerator: Accelerator, log: Log) -> None:
    """End the run of the tracker."""
    name = accelerator.trackers[0].name if accelerator.trackers else None
    with _never_fatal(accelerator, log), _quiet(name):
        accelerator.end_training()


@contextlib.contextmanager
def _never_fatal(accelerator: Accelerator, log: Log) -> Iterator[None]:
    """Go on without a tracker that fails, with a line that says why."""
    try:
        yield
    except Exception as error:  # each tracker has its own
        reason = f"{type(error).__name__}: {first_line(error)}"
        log(f"the tracker failed ({reason}): the run is logged to {LOG} only from now on")
        accelerator.trackers = []


def _quiet(tracker: str | None) -> contextlib.AbstractContextManager[Any]:
    """Hide what trackio prints: a dozen lines, among them a command that does not name the run's folder.

    Others keep their output; wandb records the program's own and must find it as it is.
    """
    return contextlib.redirect_stdout(io.StringIO()) if tracker == "trackio" else contextlib.nullcontext()


def _trackio_run(run: Path) -> dict[str, Any]:
    """Return the options of `trackio.init` for a run, whose database is in the run's folder unless TRACKIO_DIR is set.

    trackio reads the variable when it is imported: a second run in one process goes into the folder of the first.
    """
    os.environ.setdefault("TRACKIO_DIR", str(RunFolder(run).trackio.absolute()))
    return {"name": run.name, "resume": "allow"}


def _wandb_run(run: Path, log: Log) -> dict[str, Any]:
    """Return the options of `wandb.init` for a run, with the id that a resumed run keeps.

    What wandb's environment variables set is left to them.
    """
    own = {"dir": ("WANDB_DIR", str(run)), "name": ("WANDB_NAME", run.name), "resume": ("WANDB_RESUME", "allow")}
    # "allow" continues the run of that id, or starts it where wandb has none (offline, or deleted).
    options = {key: value for key, (variable, value) in own.items() if variable not in os.environ}
    if "WANDB_RUN_ID" not in os.environ:
        options["id"] = _wandb_id(run, log)
    return options


def _wandb_id(run: Path, log: Log) -> str:
    """Return the id of a run: a new one for a copy, whose original is still in its place."""
    file = RunFolder(run).wandb_id
    here = str(run.resolve())
    known, _, folder = file.read_text(encoding="utf-8").partition("\n") if file.is_file() else ("", "", "")
    original = RunFolder(Path(folder)).wandb_id
    if known and folder and folder != here and original.is_file() and original.read_bytes().startswith(known.encode()):
        log(f"{run} is a copy of another run, and is another run of wandb")
        known = ""
    if not known:
        known = uuid.uuid4().hex[:8]
    write_text(file, f"{known}\n{here}")
    return known
