"""The log of a run: `training_log.csv` and the loss curve."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..runs import RunFolder, read_log
from ..storage import new_file, write_text
from .objective import NOISE_LEVELS

COLUMNS = (
    *("step", "epoch", "images_seen", "loss", "validation_loss", "learning_rate", "grad_norm"),
    *("images_per_second", "mfu", "loss_scale", "peak_memory_gib"),
    *(f"loss_level_{level}" for level in range(NOISE_LEVELS)),
    *(f"validation_loss_level_{level}" for level in range(NOISE_LEVELS)),
)


def start_log(run: Path, step: int, columns: Sequence[str] = COLUMNS) -> None:
    """Begin `training_log.csv`, or cut it and the sample grids back to `step`, where the run resumes.

    Its columns are those asked for, and those that it had and that are not measured any more.
    """
    for drawn, sheet in RunFolder(run).sample_grids().items():
        if drawn > step:
            sheet.unlink()
    kept = [row for row in read_log(run) if int(row["step"]) <= step]
    columns = list(dict.fromkeys([*columns, *(kept[0] if kept else [])]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    write_text(RunFolder(run).log, text.getvalue())


def append_log(run: Path, row: dict[str, Any]) -> None:
    """Add one row to `training_log.csv`, which `start_log` has begun; values that are None stay empty."""
    with open(RunFolder(run).log, "r+", newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, columns, lineterminator="\n").writerow(row)


def plot_loss_curve(run: Path) -> None:
    """Draw `loss_curve.png` from the log: training and validation, and the latest validated (or trained) by level."""
    rows = read_log(run)
    validated = [row for row in rows if row["validation_loss"]]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_time, by_level = figure.subplots(1, 2, width_ratios=(3, 2))
    over_time.plot(*_points(rows, "loss"), color="#2b6cb0", label="training", linewidth=1)
    if validated:
        points = _points(validated, "validation_loss")
        over_time.plot(*points, "o-", color="#c05621", label="validation (averaged weights)")
    over_time.set(xlabel="step", ylabel="loss", title=f"Loss of {run.name}", yscale="log")
    over_time.legend()
    shown, prefix = (validated, "validation_loss") if validated else (rows, "loss")
    places = [(level + 0.5) / NOISE_LEVELS for level in range(NOISE_LEVELS)]
    for chosen, color in {0: "#e2b98f", len(shown) // 2: "#d08a4e", len(shown) - 1: "#c05621"}.items():
        values = [float(shown[chosen][f"{prefix}_level_{level}"] or "nan") for level in range(NOISE_LEVELS)]
        by_level.plot(places, values, "o-", color=color, label=f"step {shown[chosen]['step']}")
    kind = "Validation" if validated else "Training"
    by_level.set(xlabel="timestep / timesteps (noise to the right)", title=f"{kind} loss by noise level", yscale="log")
    by_level.legend()
    for axes in (over_time, by_level):
        axes.grid(visible=True, which="both", alpha=0.25)
    with new_file(RunFolder(run).loss_curve) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]
