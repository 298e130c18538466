"""A race of recipes: quality against images seen and against time, by the commands that a user has.

python benchmarks/recipes.py benchmarks/races/cpu.yaml [--minutes 50] [--only NAME ...]       (hours on 2 cores)

A race's file says what is learned from, what is compared with, and who runs: recipes, each with its own number of
images and its seeds. What is finished is not done again; a run that is stopped by `--minutes` goes on with the next
call. Results go beside the race's name to benchmarks/results/, as JSON, table and plot.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import machine
from matplotlib.figure import Figure

from dit_hf.training.report import read_log

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", type=Path)
    parser.add_argument("--minutes", type=float, default=10_000.0, help="Stop after so many.")
    parser.add_argument("--only", nargs="+", help="Names of contestants.")
    options = parser.parse_args()
    race = yaml.safe_load(options.race.read_text())
    commands = Commands(time.monotonic() + 60 * options.minutes)
    folder = Path("runs/race") / options.race.stem
    latents, real = folder / "latents", folder / "reference"
    commands.run("prepare-latents", "--source", "avatars", "--vae", "avatar", output_dir=latents, **race["latents"])
    commands.run("reference", "avatars", output_dir=real, **race["reference"])
    for name, contestant in race["contestants"].items():
        for seed in contestant["seeds"]:
            if not options.only or name in options.only:
                run = folder / f"{name}-{seed}"
                compete(commands, race, contestant, seed, run, latents, real)
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "race": {name: value for name, value in race.items() if name != "contestants"},
        "contestants": {name: describe(folder, name, contestant) for name, contestant in race["contestants"].items()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"recipes-{options.race.stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(result))
    plot(result, path.with_suffix(".png"))
    print(table(result))


class Commands:
    """`dit-hf VERB`, each until its end or the end of the time."""

    def __init__(self, end: float):
        self.end = end

    def run(self, *args: str, **options: Any) -> bool:
        """Whether there was time enough; one that was told to stop keeps what it has."""
        if time.monotonic() > self.end:
            return False
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        process = subprocess.Popen([sys.executable, "-m", "dit_hf", *args, *given])
        try:
            code = process.wait(max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return False
        if code:
            sys.exit(code)
        return True


def compete(commands: Commands, race: dict, contestant: dict, seed: int, run: Path, latents: Path, real: Path) -> None:
    """Train one contestant with one seed and evaluate it at every guidance of the race."""
    if (run / "evaluation" / "evaluation.json").is_file():
        return
    recipe = merged(race["base"], {k: v for k, v in contestant.items() if k not in ("images", "seeds")})
    steps = contestant["images"] // recipe["train"]["global_batch_size"]
    quarter = steps // 4
    own = {"output_dir": str(run), "max_train_steps": steps, "seed": seed, "report_to": "none"}
    own |= {"checkpointing_steps": quarter, "evaluation_steps": quarter, "sampling_steps": 0, "validation_images": 0}
    recipe = merged(recipe, {"data": {"latents": str(latents)}, "train": own})
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    if commands.run("train", config=path, **{"train.resume_from_checkpoint": "latest"}):
        commands.run("evaluate", str(run), reference=real, output_dir=run / "evaluation", **race["evaluation"])


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the sections of `over` laid over its own."""
    return {name: {**base.get(name, {}), **over.get(name, {})} for name in {**base, **over}}


def describe(folder: Path, name: str, contestant: dict) -> dict[str, Any]:
    """What is known of a contestant: its curve, its distance at the best guidance, and the attributes found there."""
    seeds = []
    for seed in contestant["seeds"]:
        run = folder / f"{name}-{seed}"
        log, report = read_log(run), run / "evaluation" / "evaluation.json"
        column = next((key for key in (log[0] if log else {}) if key.rpartition("-")[2].rstrip("k").isdigit()), None)
        points = [row for row in log if column and row[column]]
        entry: dict[str, Any] = {
            "seed": seed,
            "images_per_second": statistics.median(float(row["images_per_second"]) for row in log) if log else None,
            "curve": [[int(row["images_seen"]), float(row[column])] for row in points],
        }
        if report.is_file():
            rows = json.loads(report.read_text())["settings"]
            best = min(rows, key=lambda row: row["frechet_distance"])
            entry["by_guidance"] = {str(row["guidance_scale"]): row["frechet_distance"] for row in rows}
            entry |= {key: best[key] for key in ("frechet_distance", "guidance_scale", "accuracy")}
        seeds.append(entry)
    found = [entry["frechet_distance"] for entry in seeds if "frechet_distance" in entry]
    return {
        "images": contestant["images"],
        "frechet_distance": statistics.mean(found) if found else "not measured",
        "range": [min(found), max(found)] if found else None,
        "seeds": seeds,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| recipe | images | distance (range of the seeds) | guidance | attributes found |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["contestants"].items():
        done = [entry for entry in row["seeds"] if "frechet_distance" in entry]
        if not done:
            lines.append(f"| {name} | {row['images']:,} | not measured | | |")
            continue
        low, high = row["range"]
        guidance = ", ".join(f"{entry['guidance_scale']:g}" for entry in done)
        accuracy = statistics.mean(entry["accuracy"] for entry in done)
        distance = f"{row['frechet_distance']:.0f} ({low:.0f} to {high:.0f})"
        lines.append(f"| {name} | {row['images']:,} | {distance} | {guidance} | {accuracy:.3f} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Distance against images and against training time; the points at the end are of more samples."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_images, by_time = figure.subplots(1, 2, sharey=True)
    for number, (name, row) in enumerate(result["contestants"].items()):
        for entry in row["seeds"]:
            if not entry["curve"]:
                continue
            images, distances = zip(*entry["curve"], strict=True)
            label = name if entry is row["seeds"][0] else None
            by_images.plot(images, distances, "o-", color=f"C{number}", label=label, markersize=4)
            minutes = [count / entry["images_per_second"] / 60 for count in images]
            by_time.plot(minutes, distances, "o-", color=f"C{number}", markersize=4)
    by_images.set(xlabel="images seen", ylabel="Fréchet distance", xscale="log", yscale="log")
    by_time.set(xlabel="minutes of training", xscale="log")
    for axes in (by_images, by_time):
        axes.grid(visible=True, which="both", alpha=0.25)
    if by_images.get_legend_handles_labels()[0]:
        by_images.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
