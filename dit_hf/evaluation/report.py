"""The files of an evaluation: `evaluation.json` with the whole protocol, a table as Markdown, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..runs import EVALUATION_PLOT, EVALUATION_REPORT, SETTINGS_PLOT
from ..storage import new_file, write_json, write_text
from .memorization import Neighbours

REPORT = "evaluation.md"
NOT_MEASURED = "not measured"
_MODEL, _VAE, _REAL = "#2b6cb0", "#c05621", "#4a5568"


def figure_name(label: str, num_samples: int) -> str:
    """Name a Fréchet distance with its number of samples, without which it means nothing: `FID-50k`."""
    thousands = num_samples >= 1000 and num_samples % 1000 == 0
    count = f"{num_samples // 1000}k" if thousands else str(num_samples)
    return f"{label}-{count}"


def bias_note(num_samples: int, dim: int) -> str:
    """Describe how a Fréchet distance depends on its number of samples; `dim` is that of the features."""
    text = (
        f"A Fréchet distance of N = {num_samples:,} images is too high by an amount that falls as 1 / N: compare it "
        "with others of the same N only, and with the floor"
    )
    if num_samples <= dim:
        text += f"; with no more images than features ({dim:,}) most of it can be this"
    return f"{text}."


def write_report(folder: Path, report: dict[str, Any], neighbours: Neighbours) -> None:
    """Write the table, the plots and, last, the JSON: where it is, the report is complete.

    Args:
        folder: The evaluation's folder.
        report: Content of `evaluation.json`.
        neighbours: Distances of samples and real images, for the plot.
    """
    write_text(folder / REPORT, markdown(report))
    _save(plot_figures(report, neighbours), folder / EVALUATION_PLOT)
    # A plot of an earlier call with several settings would not belong to this report.
    (folder / SETTINGS_PLOT).unlink(missing_ok=True)
    if len(report["settings"]) > 1:
        _save(plot_settings(report), folder / SETTINGS_PLOT)
    write_json(folder / EVALUATION_REPORT, report)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown: the figures, and the protocol."""
    return "\n".join([table(report), "", "## Protocol", "", *_protocol_table(report), ""])


def table(report: dict[str, Any]) -> str:
    """Return the figures as Markdown: the model beside its two floors, attributes and settings."""
    lines = [
        f"# {report['model']['name']}: {report['name']} {_with_error(report['figures'])}",
        "",
        *_figures_table(report),
        "",
        f"± is 1.96 standard errors. {report['bias']}",
        "",
        _memorization_sentence(report["memorisation"]),
    ]
    if report["attributes"]:
        lines += ["", _attributes_sentence(report["attributes"])]
    if len(report["settings"]) > 1:
        lines += ["", *_settings_table(report["settings"])]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """Return the figure and its floor in one line."""
    floors = {"the VAE's reconstructions": report["floor"]["vae"], "real images": report["floor"]["real"]}
    measured = [f"{f['frechet_distance']:.4g} ({name})" for name, f in floors.items() if "frechet_distance" in f]
    return f"{report['name']} {_with_error(report['figures'])}, floor {', '.join(measured)}"


def _figures_table(report: dict[str, Any]) -> list[str]:
    floor = report["floor"]
    columns = [report["figures"], floor["vae"], floor["real"]]
    rows = [
        [report["name"], *(_with_error(column) for column in columns)],
        ["extrapolated to infinitely many", *(_number(column, "extrapolated") for column in columns)],
        ["KID", *(_number(column, "kid") for column in columns)],
        ["precision", *(_number(column, "precision") for column in columns)],
        ["recall", *(_number(column, "recall") for column in columns)],
        ["images", *(_number(column, "num_samples") for column in columns)],
        ["reference images", *(_number(column, "num_reference") for column in columns)],
    ]
    return [
        "| | model | floor: the VAE's reconstructions | floor: real against real |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _memorization_sentence(shares: dict[str, Any]) -> str:
    return (
        f"{shares['share_within_closest_1_percent']:.1%} of the samples are nearer to a real image than the closest "
        f"1 % of real images are to each other, {shares['share_within_closest_half']:.1%} nearer than half of them."
    )


def _attributes_sentence(attributes: dict[str, Any]) -> str:
    return (
        f"{attributes['accuracy']:.1%} of the requested attributes are shown ({attributes['balanced_accuracy']:.1%} "
        f"balanced), as recognized by a head that is right about {attributes['accuracy_on_real']:.1%} of the "
        "attributes of real images it was not trained on."
    )


def _settings_table(settings: list[dict[str, Any]]) -> list[str]:
    lines = ["| guidance | steps | distance | requested attributes shown |", "|---|---|---|---|"]
    for row in settings:
        accuracy = NOT_MEASURED if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        distance = _with_error(row)
        lines.append(f"| {row['guidance_scale']:g} | {row['num_inference_steps']} | {distance} | {accuracy} |")
    return lines


def _protocol_table(report: dict[str, Any]) -> list[str]:
    """Flatten model and protocol to one table; deeper dictionaries are in the JSON only."""
    protocol = report["protocol"]
    rows = {**report["model"], **protocol, "features": protocol["features"]["name"]}
    rows |= {f"features: {name}": value for name, value in protocol["features"].items() if name != "name"}
    rows |= {f"reference: {name}": value for name, value in protocol["reference"].items()}
    rows = {name: value for name, value in rows.items() if not isinstance(value, dict)}
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def plot_figures(report: dict[str, Any], neighbours: Neighbours) -> Figure:
    """Plot the distance beside its floors, and how near samples and real images are to their nearest real image."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)

    # Left: a bar for the model and each floor that was measured, the model on top.
    floor = report["floor"]
    bars = [
        ("model", report["figures"], _MODEL),
        ("VAE's reconstructions", floor["vae"], _VAE),
        ("real against real", floor["real"], _REAL),
    ]
    bars = [bar for bar in bars if "frechet_distance" in bar[1]]
    for y, (name, column, color) in enumerate(reversed(bars)):
        value, error = column["frechet_distance"], 1.96 * column["standard_error"]
        left.barh(y, value, xerr=error, color=color, height=0.6, capsize=4)
        left.text(value + error, y, f"  {value:.4g}", va="center")
        left.text(0, y + 0.32, f" {name}, N = {column['num_samples']:,}", va="bottom", fontsize=9)
    left.set(yticks=[], ylim=(-0.5, len(bars) - 0.2), title=f"{report['name']} of {report['model']['name']}")
    left.set_xlim(0, 1.18 * max(c["frechet_distance"] + 1.96 * c["standard_error"] for _, c, _ in bars))

    # Right: histograms on common bins.
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
    """Plot distance and attribute accuracy against guidance, a line for each number of steps.

    With a single guidance scale the two change places.
    """
    rows = report["settings"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ("guidance_scale", "num_inference_steps")
    x_name, line_name = names if len({row["guidance_scale"] for row in rows}) > 1 else names[::-1]

    # A line for each value of the other setting.
    for value in sorted({row[line_name] for row in rows}):
        line = sorted((row for row in rows if row[line_name] == value), key=lambda row: row[x_name])
        x = [row[x_name] for row in line]
        errors = [1.96 * row["standard_error"] for row in line]
        label = f"{line_name.replace('_', ' ').removeprefix('num inference ')} {value:g}"
        left.errorbar(x, [row["frechet_distance"] for row in line], errors, fmt="o-", capsize=3, label=label)
        if line[0]["accuracy"] is not None:
            right.plot(x, [row["accuracy"] for row in line], "o-", label=label)

    # The floors, and what the head reaches on real images.
    floors = {"VAE's reconstructions": (report["floor"]["vae"], _VAE), "real": (report["floor"]["real"], _REAL)}
    for name, (column, color) in floors.items():
        if "frechet_distance" in column:
            left.axhline(column["frechet_distance"], color=color, linestyle="--", label=f"floor: {name}")
    if report["attributes"]:
        right.axhline(report["attributes"]["accuracy_on_real"], color=_REAL, linestyle="--", label="on real images")

    x_label, unit = x_name.replace("_", " "), figure_name(report["name"].rpartition("-")[0], rows[0]["num_samples"])
    left.set(title=unit, xlabel=x_label, ylim=(0, None))
    right.set(title="Share of requested attributes shown", xlabel=x_label)
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
    return figure


def _with_error(column: dict[str, Any]) -> str:
    if "frechet_distance" not in column:
        return f"{NOT_MEASURED} ({column['reason']})"
    error = float(f"{1.96 * column['standard_error']:.2g}")  # two digits, and no exponent
    return f"{column['frechet_distance']:.4g} ± {error:g}"


def _number(column: dict[str, Any], name: str) -> str:
    value = column.get(name)
    if value is None:
        return NOT_MEASURED
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
