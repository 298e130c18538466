"""A race of recipes: quality against images seen and against time, measured with the user's own commands.

python benchmarks/recipes.py benchmarks/races/cpu.yaml [--minutes 50] [--only NAME ...]       (hours on 2 cores)

A race's file defines the training data, the reference, and the contestants: recipes, each with its number of images
and its seeds. A race without an `evaluation` has only the measurements taken during training. Results are written to
benchmarks/results/ under the race's name as JSON and table; an evaluation adds a plot and a row of faces a recipe.
Finished or recorded runs are not repeated; the next call resumes a run that `--minutes` has stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
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
from PIL import Image
from race_plot import plot

from dit_hf import open_images
from dit_hf.evaluation.metrics import frechet_distance
from dit_hf.evaluation.reference import INFO, load_reference
from dit_hf.evaluation.report import figure_name
from dit_hf.image_grid import make_grid, save_grid
from dit_hf.runs import load_pipeline, read_log
from dit_hf.sampling.generate import generate_images

CUDA = torch.cuda.is_available()
DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
FACES = 12
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", type=Path)
    parser.add_argument("--minutes", type=float, default=10_000.0, help="Stop after so many.")
    parser.add_argument("--only", nargs="+", help="Names of contestants.")
    parser.add_argument("--precision", default="fp16" if CUDA else "no", choices=["no", "fp16", "bf16"])
    options = parser.parse_args()
    race = yaml.safe_load(options.race.read_text())
    race["base"]["train"]["mixed_precision"] = options.precision
    path = RESULTS / f"recipes-{options.race.stem}.json"
    recorded = json.loads(path.read_text())["contestants"] if path.is_file() else {}
    commands = Commands(time.monotonic() + 60 * options.minutes)
    folder = Path("runs/race") / options.race.stem
    latents, real = folder / "latents", folder / "reference"
    commands.run("prepare-latents", "--source", "avatars", output_dir=latents, **race["latents"])
    if "evaluation" in race:
        commands.run("reference", "avatars", output_dir=real, **race["reference"])
        # The decoded cache is the best that any contestant can reach.
        count = race["reference"]["num_images"]
        commands.run("reference", str(latents), output_dir=folder / "reconstructed", num_images=count)
    for name, contestant in race["contestants"].items():
        for seed in contestant["seeds"]:
            selected = not options.only or name in options.only
            if selected and "frechet_distance" not in on_record(recorded, name, contestant["images"], seed):
                compete(commands, race, contestant, seed, folder / f"{name}-{seed}", latents, real)
    column = figure_name("FD-efficientnet-lite0", race["base"]["train"]["evaluation_samples"])
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "floor": floor(folder / "reconstructed", real),
        "race": {name: value for name, value in race.items() if name != "contestants"},
        "contestants": {name: describe(race, folder, name, column, recorded) for name in race["contestants"]},
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(result))
    if "evaluation" in race:
        plot(result, path.with_suffix(".png"))
        save_faces(race, folder, real, path.with_name(f"{path.stem}-faces"))
    print(table(result))


class Commands:
    """Runner of `dit-hf VERB` commands, each until it ends or the time is up."""

    def __init__(self, end: float):
        self.end = end

    def run(self, *args: str, **options: Any) -> bool:
        """Run a command and return whether it finished; a command that runs out of time is shut down gracefully."""
        if time.monotonic() > self.end:
            return False
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if "num_proc" in options else {}  # a cache is built by CPUs or by a GPU
        process = subprocess.Popen([sys.executable, "-m", "dit_hf", *args, *given], env=os.environ | hidden)
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
    """Train a contestant with one seed, choose its guidance with few samples, and evaluate it with many others."""
    recipe = contestant_recipe(race, contestant)
    steps = contestant["images"] // recipe["train"]["global_batch_size"]
    every = steps // max(1, contestant["images"] // race["curve_images"])
    own = {"output_dir": str(run), "max_train_steps": steps, "seed": seed, "report_to": "none"}
    own |= {"checkpointing_steps": every, "evaluation_steps": every, "sampling_steps": steps, "validation_images": 0}
    path = run.with_name(f"{run.name}.yaml")
    path.write_text(yaml.safe_dump(merged(recipe, {"data": {"latents": str(latents)}, "train": own}), sort_keys=False))
    measured = commands.run("train", config=path, **{"train.resume_from_checkpoint": "latest"})
    for name, seed_of_samples in (("guidance", 1), ("evaluation", 0)):
        if measured and name in race and not (run / name / "evaluation.json").is_file():
            options = {**race[name], "reference": real, "output_dir": run / name, "seed": seed_of_samples}
            options["dtype"] = DTYPES[recipe["train"]["mixed_precision"]]
            if name == "evaluation":
                options["guidance_scale"] = best_guidance(run)
            measured = commands.run("evaluate", str(run), **options)


def floor(rebuilt: Path, real: Path) -> float | str:
    """Return the distance of the VAE's reconstructions."""
    if not all((folder / INFO).is_file() for folder in (rebuilt, real)):
        return "not measured"
    return frechet_distance(load_reference(rebuilt).gaussian, load_reference(real).gaussian)


def measured_rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Return a run's measurements at each guidance scale; `name` is `guidance` or `evaluation`."""
    return json.loads((run / name / "evaluation.json").read_text())["settings"]


def best_guidance(run: Path) -> float:
    """Return the guidance scale with the lowest distance."""
    return min(measured_rows(run, "guidance"), key=lambda row: row["frechet_distance"])["guidance_scale"]


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the sections of `over` merged into its own."""
    return {name: {**base.get(name, {}), **over.get(name, {})} for name in {**base, **over}}


def contestant_recipe(race: dict[str, Any], contestant: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a contestant's recipe, over the race's `base`."""
    return merged(race["base"], {name: value for name, value in contestant.items() if name not in ("images", "seeds")})


def on_record(recorded: dict[str, Any], name: str, images: int, seed: int) -> dict[str, Any]:
    """Return the recorded result of a contestant's seed; {} if there is none for this number of images."""
    contestant = recorded.get(name, {})
    entries = contestant["seeds"] if contestant.get("images") == images else []
    return next((entry for entry in entries if entry["seed"] == seed), {})


def describe(race: dict, folder: Path, name: str, column: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return a contestant's curve, its distance at the best guidance, and its attribute accuracy.

    A finished seed keeps its recorded result, even if its run has been deleted.
    """
    contestant, seeds = race["contestants"][name], []
    for seed in contestant["seeds"]:
        run, entry = folder / f"{name}-{seed}", on_record(recorded, name, contestant["images"], seed)
        log, report = read_log(run), run / "evaluation" / "evaluation.json"
        if "frechet_distance" in entry or not log:
            seeds.append(entry or {"seed": seed, "curve": []})
            continue
        points = [row for row in log if row.get(column)]
        entry = {
            "seed": seed,
            "machine": machine(),
            "precision": yaml.safe_load((run / "config.yaml").read_text())["train"]["mixed_precision"],
            "images_per_second": statistics.median(float(row["images_per_second"]) for row in log),
            "curve": [[int(row["images_seen"]), float(row[column])] for row in points],
        }
        if report.is_file():
            rows = measured_rows(run, "guidance")
            entry["by_guidance"] = {str(row["guidance_scale"]): row["frechet_distance"] for row in rows}
            (row,) = measured_rows(run, "evaluation")
            entry |= {key: row[key] for key in ("frechet_distance", "guidance_scale", "accuracy")}
        elif "evaluation" not in race and (run / "pipeline").is_dir():  # finished
            entry |= {"frechet_distance": entry["curve"][-1][1]}
        seeds.append(entry)
    distances = [entry["frechet_distance"] for entry in seeds if "frechet_distance" in entry]
    return {
        "images": contestant["images"],
        "frechet_distance": statistics.mean(distances) if distances else "not measured",
        "range": [min(distances), max(distances)] if distances else None,
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
        distance = f"{row['frechet_distance']:.0f} ({low:.0f} to {high:.0f})" if len(done) > 1 else f"{low:.0f}"
        guidance, accuracy = f"{result['race']['base']['train']['guidance_scale']:g}", ""
        if "accuracy" in done[0]:
            guidance = ", ".join(f"{entry['guidance_scale']:g}" for entry in done)
            accuracy = f"{statistics.mean(entry['accuracy'] for entry in done):.3f}"
        lines.append(f"| {name} | {row['images']:,} | {distance} | {guidance} | {accuracy} |")
    if isinstance(result["floor"], float):
        lines.append(f"| the VAE's reconstructions | | {result['floor']:.0f} | | |")
    return "\n".join(lines) + "\n"


def save_faces(race: dict[str, Any], folder: Path, real: Path, output: Path) -> None:
    """Save a row of faces for each contestant's first seed at its best guidance, with the same noise and attributes.

    `avatars.png` shows the avatars with these attributes. The row of a deleted run stays as it is.
    """
    numbers = range(FACES)
    avatars = open_images("avatars", **{**race["reference"], "num_images": FACES})
    output.mkdir(exist_ok=True)
    save_grid(make_grid(list(avatars["image"]), FACES, title="avatars"), output / "avatars.png")
    for name, contestant in race["contestants"].items():
        run = folder / f"{name}-{contestant['seeds'][0]}"
        if not (run / "guidance" / "evaluation.json").is_file():
            continue
        pipeline, title = load_pipeline(str(run)), f"{name}, {contestant['images']:,} images seen"
        requested = load_reference(real).attributes(list(pipeline.transformer.config.conditions))
        faces = generate_images(pipeline, numbers, requested, seed=0, guidance_scale=best_guidance(run))
        row = make_grid([Image.fromarray(face) for face in faces], FACES, title=title)
        save_grid(row, output / f"{name}.png")


if __name__ == "__main__":
    main()
