"""What an evaluation leaves: `evaluation.json` with the whole protocol, a table, plots, and the card's entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..runs import EVALUATION_PLOT, EVALUATION_REPORT, SETTINGS_PLOT
from ..storage import new_file, write_text
from .memorization import Neighbours

NOT_MEASURED = "not measured"
_MODEL, _VAE, _REAL = "#2b6cb0", "#c05621", "#4a5568"


def figure_name(label: str, num_samples: int) -> str:
    """A Fréchet distance's name with its number of samples, without which it says nothing: `FID-50k`."""
    many = num_samples >= 1000 and num_samples % 1000 == 0
    count = f"{num_samples // 1000}k" if many else str(num_samples)
    return f"{label}-{count}"


def write_report(folder: Path, report: dict[str, Any], neighbours: Neighbours) -> None:
    """Write table and plots, and last the JSON, which says that all is there."""
    write_text(folder / "evaluation.md", markdown(report))
    _save(plot_figures(report, neighbours), folder / EVALUATION_PLOT)
    (folder / SETTINGS_PLOT).unlink(missing_ok=True)
    if len(report["settings"]) > 1:
        _save(plot_settings(report), folder / SETTINGS_PLOT)
    write_text(folder / EVALUATION_REPORT, json.dumps(report, indent=2) + "\n")


def markdown(report: dict[str, Any]) -> str:
    """The table: the model beside what its VAE makes of real images, and beside real images themselves."""
    floor = report["floor"]
    columns = [report["figures"], floor["vae"], floor["real"]]
    protocol, memory = report["protocol"], report["memorisation"]
    rows = [
        [report["name"], *(_with_error(column) for column in columns)],
        ["extrapolated to infinitely many", *(_number(column, "extrapolated") for column in columns)],
        ["KID", *(_number(column, "kid") for column in columns)],
        ["precision", *(_number(column, "precision") for column in columns)],
        ["recall", *(_number(column, "recall") for column in columns)],
        ["pictures", *(_number(column, "num_samples") for column in columns)],
        ["reference images", *(_number(column, "num_reference") for column in columns)],
    ]
    lines = [
        f"# {report['model']['name']}: {report['name']} {_with_error(report['figures'])}",
        "",
        "| | model | floor: the VAE's reconstructions | floor: real against real |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"± is 1.96 standard errors. {report['bias']}",
        "",
        f"{memory['share_within_closest_1_percent']:.1%} of the samples are nearer to a real image than the closest "
        f"1 % of real ones are to each other, {memory['share_within_closest_half']:.1%} nearer than half of them.",
        "",
    ]
    if report["attributes"]:
        found = report["attributes"]
        lines += [
            f"Attributes asked for and found: {found['accuracy']:.1%} ({found['balanced_accuracy']:.1%} balanced); on "
            f"real images that it has not seen the head that looks for them is right in "
            f"{found['accuracy_on_real']:.1%}.",
            "",
        ]
    if len(report["settings"]) > 1:
        lines += ["| guidance | steps | distance | attributes found |", "|---|---|---|---|"]
        for row in report["settings"]:
            found = NOT_MEASURED if row["accuracy"] is None else f"{row['accuracy']:.3f}"
            distance = _with_error(row)
            lines.append(f"| {row['guidance_scale']:g} | {row['num_inference_steps']} | {distance} | {found} |")
        lines.append("")
    flat = {**report["model"], **protocol, "features": protocol["features"]["name"]}
    flat |= {f"features: {name}": value for name, value in protocol["features"].items() if name != "name"}
    flat |= {f"reference: {name}": value for name, value in protocol["reference"].items()}
    flat = {name: value for name, value in flat.items() if not isinstance(value, dict)}
    lines += ["## Protocol", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in flat.items()), ""]
    return "\n".join(lines)


def plot_figures(report: dict[str, Any], neighbours: Neighbours) -> Figure:
    """The distance beside its floors, and how near samples and real images are to their nearest real one."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    floor = report["floor"]
    shown = [("model", report["figures"], _MODEL), ("VAE's reconstructions", floor["vae"], _VAE)]
    shown = [row for row in [*shown, ("real against real", floor["real"], _REAL)] if "frechet_distance" in row[1]]
    for place, (name, column, color) in enumerate(reversed(shown)):
        value, error = column["frechet_distance"], 1.96 * column["standard_error"]
        left.barh(place, value, xerr=error, color=color, height=0.6, capsize=4)
        left.text(value + error, place, f"  {value:.4g}", va="center")
        left.text(0, place + 0.32, f" {name}, N = {column['num_samples']:,}", va="bottom", fontsize=9)
    left.set(yticks=[], ylim=(-0.5, len(shown) - 0.2), title=f"{report['name']} of {report['model']['name']}")
    left.set_xlim(0, 1.18 * max(c["frechet_distance"] + 1.96 * c["standard_error"] for _, c, _ in shown))
    bins = np.linspace(0, max(neighbours.distances.max(), neighbours.real.max()), 60)
    for values, name, color in (
        (neighbours.real, "real images, to the others", _REAL),
        (neighbours.distances, "samples, to real images", _MODEL),
    ):
        right.hist(values, bins, density=True, histtype="stepfilled", alpha=0.5, color=color, label=name)
    right.set(title="Distance to the nearest real image", xlabel="in feature space", yticks=[])
    right.legend()
    return figure


def plot_settings(report: dict[str, Any]) -> Figure:
    """Distance and accuracy of the asked attributes against guidance, a line for each number of steps."""
    rows = report["settings"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ("guidance_scale", "num_inference_steps")
    along, across = names if len({row["guidance_scale"] for row in rows}) > 1 else names[::-1]
    for value in sorted({row[across] for row in rows}):
        line = sorted((row for row in rows if row[across] == value), key=lambda row: row[along])
        places = [row[along] for row in line]
        errors = [1.96 * row["standard_error"] for row in line]
        label = f"{across.replace('_', ' ').removeprefix('num inference ')} {value:g}"
        left.errorbar(places, [row["frechet_distance"] for row in line], errors, fmt="o-", capsize=3, label=label)
        if line[0]["accuracy"] is not None:
            right.plot(places, [row["accuracy"] for row in line], "o-", label=label)
    floors = {"VAE's reconstructions": (report["floor"]["vae"], _VAE), "real": (report["floor"]["real"], _REAL)}
    for name, (column, color) in floors.items():
        if "frechet_distance" in column:
            left.axhline(column["frechet_distance"], color=color, linestyle="--", label=f"floor: {name}")
    if report["attributes"]:
        right.axhline(report["attributes"]["accuracy_on_real"], color=_REAL, linestyle="--", label="on real images")
    title, unit = along.replace("_", " "), figure_name(report["name"].rpartition("-")[0], rows[0]["num_samples"])
    left.set(title=unit, xlabel=title, ylim=(0, None))
    right.set(title="Attributes asked for and found", xlabel=title)
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
    return figure


def _with_error(column: dict[str, Any]) -> str:
    if "frechet_distance" not in column:
        return f"{NOT_MEASURED} ({column['reason']})"
    return f"{column['frechet_distance']:.4g} ± {1.96 * column['standard_error']:.2g}"


def _number(column: dict[str, Any], name: str) -> str:
    value = column.get(name)
    if value is None:
        return NOT_MEASURED
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
