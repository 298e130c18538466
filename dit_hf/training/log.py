"""The log of a run: `training_log.csv`, the loss curve, and messages that are printed once."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure

from ..runs import RunFolder, read_log
from ..storage import new_file, write_text
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


def start_log(run: Path, step: int, columns: Sequence[str] = COLUMNS) -> None:
    """Start `training_log.csv`, or cut it and the sample grids back to `step`, where the run resumes.

    Its columns are `columns`, and after them those of earlier rows that are no longer measured.
    """
    # A run that goes back to an earlier checkpoint shows nothing of what came after it.
    for grid_step, grid in RunFolder(run).sample_grids().items():
        if grid_step > step:
            grid.unlink()

    # Written anew as a whole, since a row that a kill cut short must not stay and the columns may have changed.
    rows = [row for row in read_log(run) if int(row["step"]) <= step]
    columns = list(dict.fromkeys([*columns, *(rows[0] if rows else [])]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(RunFolder(run).log, text.getvalue())


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


def append_log(run: Path, row: dict[str, Any]) -> None:
    """Append one row to `training_log.csv`, which `start_log` has started; values that are None stay empty."""
    with open(RunFolder(run).log, "r+", newline="", encoding="utf-8") as file:
        # The file's own header decides the order of the columns: an earlier version may have written another one.
        columns = next(csv.reader(file))
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, columns, lineterminator="\n").writerow(row)


def plot_loss_curve(run: Path) -> None:
    """Plot `loss_curve.png` from the log: losses over time, and by noise level at the start, middle and end."""
    rows = read_log(run)
    validated = [row for row in rows if row["validation_loss"]]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
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

    for axes in (over_time, by_level):
        axes.grid(visible=True, which="both", alpha=0.25)
    with new_file(RunFolder(run).loss_curve) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]
