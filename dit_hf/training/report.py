"""What a run shows of itself: the log, the curve, the trackers."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import compare_versions
from matplotlib.figure import Figure
from PIL import Image

from ..hub.card import list_sheets
from ..storage import first_line, new_file, write_text
from .objective import NOISE_LEVELS

LOG = "training_log.csv"
COLUMNS = (
    *("step", "epoch", "images_seen", "loss", "validation_loss", "learning_rate", "grad_norm"),
    *("images_per_second", "mfu", "loss_scale", "peak_memory_gib"),
    *(f"loss_level_{level}" for level in range(NOISE_LEVELS)),
    *(f"validation_loss_level_{level}" for level in range(NOISE_LEVELS)),
)
# Peak of dense fp16 and bf16 products in TFLOP/s by the words in the device's name; the first that fits (NVIDIA's data
# sheets).
PEAK_TFLOPS = {
    "B200": 2250,
    "GB200": 2500,
    "H200": 989,
    "GH200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "A40": 150,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100": 125,
    "T4": 65,
}


class Speed:
    """Steps a second of the time in which there were steps.

    Attributes:
        steps: Since `read`; to be counted up.
    """

    def __init__(self) -> None:
        self.steps, self._began = 0, time.monotonic()

    def read(self) -> float:
        """Steps a second since the last call; the device must have been waited for."""
        now = time.monotonic()
        rate, self.steps, self._began = self.steps / (now - self._began), 0, now
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time the block takes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stopped = time.monotonic()
        yield
        self._began += time.monotonic() - stopped


def flops_per_image(config: Any) -> float:
    """FLOPs of forward and backward of one image: thrice the forward's matrix products, modulation not counted.

    A token takes (8 + 4 mlp_ratio) d^2 + 4 N d a layer, d the width and N the number of tokens.
    """
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    tokens = (height // config.patch_size) * (width // config.patch_size)
    dim = config.num_attention_heads * config.attention_head_dim
    token = (8 + 4 * config.mlp_ratio) * dim**2 + 4 * tokens * dim
    return 3.0 * tokens * config.num_layers * token


def mfu(config: Any, images_per_second: float, accelerator: Accelerator) -> float | None:
    """Share of the GPUs' peak that the model's FLOPs are; None where the peak is not known, or in float32."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device))
    if peak is None:
        return None
    return round(flops_per_image(config) * images_per_second / (peak * accelerator.num_processes), 4)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU's dense half-precision products; None where it is not known."""
    words = f" {re.sub('[^A-Za-z0-9]+', ' ', device_name)} "
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if f" {known} " in words), None)


def start_log(run: Path, step: int, columns: Sequence[str] = COLUMNS) -> None:
    """Begin `training_log.csv`, or cut it back to whole rows up to `step`, where the run goes on; sheets likewise.

    Its columns are those asked for, and those that it had and that are not measured any more.
    """
    for drawn, sheet in list_sheets(run).items():
        if drawn > step:
            sheet.unlink()
    kept = [row for row in read_log(run) if int(row["step"]) <= step]
    columns = list(dict.fromkeys([*columns, *(kept[0] if kept else [])]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    write_text(run / LOG, text.getvalue())


def append_log(run: Path, row: dict[str, Any]) -> None:
    """Add one row to `training_log.csv`, which `start_log` has begun; values that are None stay empty."""
    with open(run / LOG, "r+", newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, columns, lineterminator="\n").writerow(row)


def read_log(run: Path) -> list[dict[str, str]]:
    """The whole rows of a run's log; a last row cut short by a kill is not one."""
    if not (run / LOG).is_file():
        return []
    text = (run / LOG).read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in rows if None not in row.values() and None not in row]


def draw_loss_curve(run: Path) -> None:
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
    with new_file(run / "loss_curve.png") as partial:
        figure.savefig(partial, dpi=120, format="png")


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


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
    file = run / "wandb_id"
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8])
    kept = {"id": file.read_text(encoding="utf-8"), "resume": "allow"}
    return {"wandb": {"dir": str(run), "name": run.name, **kept, **options}}


def log_sheet(trackers: list[GeneralTracker], path: Path, step: int) -> None:
    """Send a sheet to the trackers that take pictures."""
    sheet = np.asarray(Image.open(path).convert("RGB"))[None]
    for tracker in trackers:
        if isinstance(tracker, WandBTracker):
            tracker.log_images({"samples": sheet}, step=step)
        elif isinstance(tracker, TensorBoardTracker):
            tracker.log_images({"samples": sheet}, step=step, dataformats="NHWC")
