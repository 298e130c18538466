"""What a run shows of itself: the log, the curve, the trackers, the card."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure

from ..storage import write_text
from .config import shipped_file

LOG = "training_log.csv"
COLUMNS = (
    *("step", "epoch", "images_seen", "loss", "learning_rate", "grad_norm"),
    *("images_per_second", "loss_scale", "peak_memory_gib"),
)


def start_log(run: Path, step: int) -> None:
    """Begin `training_log.csv`, or cut it back to whole rows up to `step`, where the run goes on."""
    kept = [row for row in read_log(run) if int(row["step"]) <= step]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    write_text(run / LOG, text.getvalue())


def append_log(run: Path, row: dict[str, Any]) -> None:
    """Add one row to `training_log.csv`; values that are None stay empty."""
    with open(run / LOG, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def read_log(run: Path) -> list[dict[str, str]]:
    """The whole rows of a run's log; a last row cut short by a kill is not one."""
    if not (run / LOG).is_file():
        return []
    text = (run / LOG).read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in rows if None not in row.values() and None not in row]


def draw_loss_curve(run: Path) -> None:
    """Draw `loss_curve.png` from the log."""
    rows = read_log(run)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], color="#2b6cb0")
    axes.set(xlabel="step", ylabel="training loss", title=f"Training loss of {run.name}")
    axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.25)
    partial = run / ".loss_curve.partial.png"
    figure.savefig(partial, dpi=120)
    partial.replace(run / "loss_curve.png")


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

    try:
        reason = None if wandb.login(prompt=False) else "no wandb login"
    except wandb.Error as error:
        reason = f"wandb: {str(error).splitlines()[0]}"
    if reason is None:
        return report_to, {}
    say(f"{reason}: the run is logged offline (upload it later with `wandb sync`)")
    return report_to, {"mode": "offline"}


def write_card(run: Path, facts: dict[str, Any]) -> None:
    """Fill the model card's template, `model_card.md`, with the facts of a run, as its `README.md`."""
    template = shipped_file("model_card.md")
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "latent-diffusion", "diffusion-transformer", "dit_hf"],
    )
    write_text(run / "README.md", str(ModelCard.from_template(data, template_path=str(template), **facts)))
