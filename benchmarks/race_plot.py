"""Plot a race of recipes: distance against images seen and against minutes of training."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

TICKS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
LABEL_DISTANCE = 11  # points between two labels


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot the distance at the end of training, a line a recipe through its lengths, on log axes.

    Bars are the range of the seeds. Only runs on the machine of the result are plotted against time.
    """
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    timed: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for name, row in result["contestants"].items():
        recipe = re.sub("-(twentieth|eighth|half|long)$", "", name)
        rates = [seed["images_per_second"] for seed in row["seeds"] if seed.get("machine") == result["machine"]]
        if row["range"]:
            lines.setdefault(recipe, []).append((row["images"], row))
            if rates:
                timed.setdefault(recipe, []).append((row["images"] / statistics.median(rates) / 60, row))
    colors = {recipe: f"C{number}" for number, recipe in enumerate(lines)}
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    by_images, by_time = figure.subplots(1, 2, sharey=True)
    samples = result["race"]["evaluation"]["num_samples"]
    by_images.set(xlabel="images seen", ylabel=f"Fréchet distance of {samples:,} samples (lower is better)")
    by_time.set(xlabel=f"minutes of training ({result['machine'].replace('1 threads', 'one thread')})")
    _draw(by_images, lines, colors, result["floor"])
    _draw(by_time, timed, colors, result["floor"])
    figure.savefig(path, dpi=100)


def _draw(axes: Axes, lines: dict[str, list], colors: dict[str, str], floor: float | str) -> None:
    """Draw the lines with their names beside their last points, and the distance of the VAE's reconstructions."""
    axes.set(xscale="log", yscale="log")
    ends = {}
    for recipe, points in lines.items():
        at, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        mean = [row["frechet_distance"] for row in rows]
        bars = [[m - row["range"][0] for m, row in zip(mean, rows, strict=True)]]
        bars += [[row["range"][1] - m for m, row in zip(mean, rows, strict=True)]]
        axes.errorbar(at, mean, bars, color=colors[recipe], marker="o", markersize=5, capsize=3)
        ends[recipe] = (at[-1], mean[-1])
    if isinstance(floor, float):
        axes.axhline(floor, color="grey", linewidth=1, linestyle=":")
        axes.annotate("the VAE's reconstructions", (0.02, floor), (0, 4), **_text("grey", "axes fraction"))
    axes.margins(x=0.3, y=0.08)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(visible=True, alpha=0.25)

    # The names, from the highest down, pushed apart where lines end close to each other.
    lowest = float("inf")
    for recipe, end in sorted(ends.items(), key=lambda item: -item[1][1]):
        height = axes.transData.transform(end)[1] * 72 / axes.figure.dpi
        shift = min(0.0, lowest - LABEL_DISTANCE - height)
        lowest = height + shift
        axes.annotate(recipe, end, (8, shift), **_text(colors[recipe], "data"))


def _text(color: str, x: str) -> dict[str, Any]:
    """Return the options of a label: its colour, and the units of its place along x."""
    return {"xycoords": (x, "data"), "textcoords": "offset points", "color": color, "fontsize": 9, "va": "center"}
