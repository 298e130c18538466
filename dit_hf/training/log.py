"""The log of a run: `training_log.csv`, the loss curve, and messages that are printed once."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..runs import LOG, RunFolder, checkpoint_step, read_log
from ..storage import new_file, same_content, write_text
from .health import check_health
from .objective import NOISE_LEVELS
from .optimizer import learning_rate
from .step import TrainingStep
from .throughput import Speed, mfu

COLUMNS = (
    *("step", "epoch", "images_seen", "loss", "validation_loss", "learning_rate", "grad_norm"),
    *("images_per_second", "mfu", "loss_scale", "peak_memory_gib"),
    *(f"loss_level_{level}" for level in range(NOISE_LEVELS)),
    *(f"validation_loss_level_{level}" for level in range(NOISE_LEVELS)),
)
_printed: set[str] = set()


def print_once(line: str) -> None:
    """Print a line, on the first rank only and never twice."""
    if line not in _printed and PartialState().is_main_process:
        print(line, flush=True)
    _printed.add(line)


def print_again() -> None:
    """Forget what was printed, where another run of the same process begins."""
    _printed.clear()


def start_log(run: Path, step: int, columns: Sequence[str] = COLUMNS, checkpoint: Path | None = None) -> None:
    """Start the log of a run, or restore it as it was after `step` steps, where the run resumes.

    A run that goes back to an earlier checkpoint writes its log and sample grids into `branch` at first: what came
    after that checkpoint stays until there is a new one (see [`finish_branch`]).

    Args:
        run: The run's folder.
        step: Steps done.
        columns: What is measured. Columns of earlier rows that are no longer measured come after these.
        checkpoint: The checkpoint that the run resumes from, which holds the log; those of earlier versions do not.
    """
    folder = RunFolder(run)
    kept = checkpoint / LOG if checkpoint is not None else None
    if folder.branch.is_dir():
        # The first checkpoint of a branch stands if it holds the branch's log.
        branch_log = RunFolder(folder.branch).log
        if kept is not None and kept.is_file() and branch_log.is_file() and same_content(kept, branch_log):
            finish_branch(run, step)
        shutil.rmtree(folder.branch, ignore_errors=True)

    if kept is not None and kept.is_file():
        _set_unreadable_aside(run)
        rows = read_log(kept.parent)
    else:
        rows = [row for row in read_log(run) if int(row["step"]) <= step]
        if step and not any(int(row["step"]) == step for row in rows):
            before = f"step {rows[-1]['step']}" if rows else "its beginning"
            print_once(f"{folder.log} has no rows from {before} to step {step}: they are missing from now on")
    columns = list(dict.fromkeys([*columns, *(rows[0] if rows else [])]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    place = live_folder(run, step)
    place.path.mkdir(exist_ok=True)
    write_text(place.log, text.getvalue())
    if place == folder:
        _remove_grids(folder, step)


def live_folder(run: Path, step: int) -> RunFolder:
    """Return where a run that resumes at `step` writes log and grids: `branch` if there are later checkpoints."""
    folder = RunFolder(run)
    later = [checkpoint for checkpoint in folder.checkpoints() if checkpoint_step(checkpoint) > step]
    return RunFolder(folder.branch) if later else folder


def finish_branch(run: Path, step: int) -> None:
    """Make the log and sample grids of `branch` the run's own, once its checkpoint of `step` stands.

    It can be called again if it was interrupted.
    """
    folder, branch = RunFolder(run), RunFolder(RunFolder(run).branch)
    _remove_grids(folder, step)
    for grid_step, grid in branch.sample_grids().items():
        folder.sample_grid(grid_step).parent.mkdir(exist_ok=True)
        grid.replace(folder.sample_grid(grid_step))
    _set_unreadable_aside(run)
    write_text(folder.log, branch.log.read_text(encoding="utf-8"))
    shutil.rmtree(branch.path)


def _remove_grids(folder: RunFolder, step: int) -> None:
    for grid_step, grid in folder.sample_grids().items():
        if grid_step > step:
            grid.unlink()


def _set_unreadable_aside(run: Path) -> None:
    """Rename a log that a spreadsheet, say, has changed beyond reading."""
    log = RunFolder(run).log
    try:
        read_log(run)
    except ValueError:
        aside = log.with_name(f"{log.stem}-unread{log.suffix}")
        log.replace(aside)
        print_once(f"{log} could not be read and is now {aside.name}; the rows come from the checkpoint")


def measure(step: TrainingStep, run: Path, done: int, grad_norm: torch.Tensor, speed: Speed) -> dict[str, Any]:
    """Return the row of the log after `done` steps, without validation, and start a new window.

    Args:
        step: Holds the sums since the last row.
        run: The run's folder.
        done: Optimizer steps done.
        grad_norm: Norm of the last step's gradient, on the device.
        speed: Has counted the steps since the last row.

    Raises:
        ValueError: if a loss, gradient or weight is not finite.
    """
    config, accelerator = step.config, step.accelerator
    # This waits for the device, so that the clock below stops after the last step's work and not before.
    total, count = check_health(step, done, run)  # each [NOISE_LEVELS]
    step.begin_window()
    images_seen = done * config.train.global_batch_size
    images_per_second = speed.read() * config.train.global_batch_size

    on_gpu = step.device.type == "cuda"
    row = {
        "step": done,
        "epoch": round(images_seen / len(step.reader), 4),
        "images_seen": images_seen,
        "loss": (total.sum() / count.sum()).item(),
        "learning_rate": learning_rate(config.optim, done - 1, config.train.max_train_steps),
        "grad_norm": grad_norm.item(),
        "images_per_second": round(images_per_second, 2),
        "mfu": mfu(step.transformer.config, images_per_second, accelerator),
        "loss_scale": accelerator.scaler.get_scale() if accelerator.scaler else None,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
    }
    # A short window may have seen no image at some noise level.
    by_level = zip(total.tolist(), count.tolist(), strict=True)
    return row | {f"loss_level_{i}": value / n if n else None for i, (value, n) in enumerate(by_level)}


def append_log(log: Path, row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Append one row to a log and sync it; values that are None stay empty. A deleted log begins anew."""
    is_new = not log.is_file()
    with open(log, "w" if is_new else "r+", newline="", encoding="utf-8") as file:
        # The file's own header decides the order of the columns: an earlier version may have written another one.
        header = columns if is_new else next(csv.reader(file), columns)
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        # A checkpoint that follows must not be on the disk before the row.
        file.flush()
        os.fsync(file.fileno())


def plot_loss_curve(run: Path) -> None:
    """Plot `loss_curve.png` from the log: losses over time, and by noise level at the start, middle and end."""
    rows = read_log(run)
    validated = [row for row in rows if row["validation_loss"]]
    figure = Figure(figsize=(11, 4.5))
    figure.subplots_adjust(0.07, 0.11, 0.98, 0.93)  # the layout that matplotlib finds takes as long as all else
    over_time, by_level = figure.subplots(1, 2, width_ratios=(3, 2))

    # Left: training and validation loss over time.
    over_time.plot(*_points(rows, "loss"), color="#2b6cb0", label="training", linewidth=1)
    if validated:
        points = _points(validated, "validation_loss")
        over_time.plot(*points, "o-", color="#c05621", label="validation (EMA weights)")
    over_time.set(xlabel="step", ylabel="loss", title=f"Loss of {run.name}", yscale="log")
    over_time.legend()

    # Right: the loss by noise level at the first, middle and last validation (or row of the log, without validation).
    # As keys of a dict, rows that coincide in a short log are plotted once.
    shown, prefix = (validated, "validation_loss") if validated else (rows, "loss")
    centers = [(level + 0.5) / NOISE_LEVELS for level in range(NOISE_LEVELS)]
    for index, color in {0: "#e2b98f", len(shown) // 2: "#d08a4e", len(shown) - 1: "#c05621"}.items():
        values = [float(shown[index][f"{prefix}_level_{level}"] or "nan") for level in range(NOISE_LEVELS)]
        by_level.plot(centers, values, "o-", color=color, label=f"step {shown[index]['step']}")
    kind = "Validation" if validated else "Training"
    by_level.set(xlabel="timestep / timesteps (noise to the right)", title=f"{kind} loss by noise level", yscale="log")
    by_level.legend()

    # Plain numbers, at 1, 2 and 5 of each decade, or closer where the losses are alike.
    for axes in (over_time, by_level):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True, which="both", alpha=0.25)
    with new_file(RunFolder(run).loss_curve) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]
