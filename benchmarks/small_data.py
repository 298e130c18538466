"""Train on few images: held-out loss, distance, and copies of training images, by setting.

python benchmarks/small_data.py MODEL [--only NAME ...]     (MODEL is the demo's run; some minutes a setting on a core)

1,000 avatars from scratch, and 300 avatars that all wear a hat, from scratch and from MODEL, which has seen avatars of
all kinds. Each setting is a training by `dit_hf.train` with 256 held-out images. 500 samples of it, for the attributes
of other avatars, are compared with these avatars. A copy is a sample that is nearer to a training image than 99 of 100
new avatars are, in the feature space of EfficientNet-Lite0; of a model that copies nothing, 1 % are.
Results are written to results/small_data.json, and a row of faces for each run that is kept to results/small_data.png.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from image_features import features_of
from machine import machine
from PIL import Image

import dit_hf
from dit_hf import demo
from dit_hf.config import TrainConfig
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import frechet_distance, nearest
from dit_hf.image_grid import make_grid, save_grid
from dit_hf.recipe_file import read_config, recipe_path
from dit_hf.runs import load_pipeline, read_log
from dit_hf.sampling.generate import batches, generate_images

FOLDER = Path("runs/small")
RESULTS = Path(__file__).parent / "results" / "small_data.json"
HELD_OUT, NEW, SAMPLES = 256, 1500, 500
# How samples are generated, by patch size: small patches and deterministic steps came first.
SAMPLING: dict[int, dict[str, Any]] = {2: {"guidance_scale": 2.0}, 4: {"guidance_scale": 2.0, **demo.SAMPLING}}
PATCHES_OF_2 = {"patch_size": 2, "global_batch_size": 16, "learning_rate": 2e-3}
# Name: images, whether the training starts from MODEL (which has patches of that size), steps, and what differs from
# the recipe and from mirrored images.
SETTINGS: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "1,000": ("all-1000", False, 1500, PATCHES_OF_2 | {"flip": False}),
    "1,000, flip": ("all-1000", False, 1500, PATCHES_OF_2),
    "300 hats": ("hats-300", False, 1500, PATCHES_OF_2),
    "300 hats from the model, 1e-3": ("hats-300", True, 400, PATCHES_OF_2 | {"learning_rate": 1e-3}),
    "1,000, flip, patches of 4": ("all-1000", False, 1500, {}),
    "300 hats, patches of 4": ("hats-300", False, 1500, {}),
    "300 hats from the model, patches of 4, 1e-3": ("hats-300", True, 300, {"learning_rate": 1e-3}),
    "300 hats from the model, patches of 4, 3e-4": ("hats-300", True, 300, {"learning_rate": 3e-4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--only", nargs="+", choices=SETTINGS)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in options.only or SETTINGS:
        if name not in results:
            results[name] = compete(name, options.model)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    save_faces([name for name in results if run_folder(name).is_dir()])


def compete(name: str, model: str) -> dict[str, Any]:
    """Train by a setting, and measure its samples."""
    source, tuned, steps, changes = SETTINGS[name]
    count = int(source.rpartition("-")[2])
    new = avatars(source)
    write_source(source, new, count)
    latents = dit_hf.prepare_latents(
        str(FOLDER / source), str(FOLDER / f"{source}-latents"), vae="avatar", resolution="64", flip=True
    )
    config = read_config(recipe_path("avatars"))
    config.data.latents, config.data.flip = str(latents), changes.get("flip", True)
    config.model.init_from = model if tuned else None
    config.model.patch_size = changes.get("patch_size", config.model.patch_size)
    config.optim.learning_rate = changes.get("learning_rate", config.optim.learning_rate)
    config.optim.lr_warmup_steps = 20 if tuned else 100
    config.train = TrainConfig(
        output_dir=str(run_folder(name)),
        max_train_steps=steps,
        global_batch_size=changes.get("global_batch_size", config.train.global_batch_size),
        checkpointing_steps=steps // 10,
        logging_steps=steps // 10,
        validation_images=HELD_OUT,
        sampling_steps=0,
        resume_from_checkpoint="latest",
        mixed_precision="no",
        report_to="none",
    )
    run = dit_hf.train(config)

    # Attributes of new avatars are requested; the same avatars are what the samples are compared with.
    sampling = SAMPLING[config.model.patch_size]
    net, rows = load_features("efficientnet-lite0"), new.select(range(count + HELD_OUT, len(new)))
    pipeline = load_pipeline(str(run))
    names = list(pipeline.transformer.config.conditions)
    requested = [{key: row[key] for key in names} for row in rows.remove_columns("image")]
    samples = np.concatenate(
        [net(generate_images(pipeline, part, requested, 0, **sampling)) for part in batches(SAMPLES, 50)]
    )
    real = features_of(net, rows["image"])
    trained = features_of(net, new.select(range(count))["image"])
    near = np.quantile(nearest(real, trained)[0], 0.01)
    losses = {int(row["step"]): float(row["validation_loss"]) for row in read_log(run) if row.get("validation_loss")}
    best = min(losses, key=losses.__getitem__)
    return {
        "images": count,
        "steps": steps,
        "patch_size": config.model.patch_size,
        "global_batch_size": config.train.global_batch_size,
        "flip": config.data.flip,
        "initialized_from": Path(model).name if tuned else None,
        "learning_rate": config.optim.learning_rate,
        "validation_losses": losses,
        "lowest_at_step": best,
        "frechet_distance": round(frechet_distance(samples, real), 1),
        "copies": float(np.mean(nearest(samples, trained)[0] < near)),
        "samples": SAMPLES,
        "sampling": sampling,
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def run_folder(name: str) -> Path:
    return FOLDER / name.replace(", ", "-").replace(",", "").replace(" ", "-")


def avatars(source: str) -> Dataset:
    """Return the avatars of a source: first those to train on, then those held out, then new ones to compare with."""
    kind, _, count = source.rpartition("-")
    wanted = int(count) + HELD_OUT + NEW
    found = dit_hf.open_images("avatars", resolution=64, num_images=wanted if kind == "all" else 14_000, seed=21)
    if kind == "hats":
        found = found.select(np.flatnonzero(found["Wearing_Hat"]))
    return found.select(range(min(wanted, len(found))))


def write_source(source: str, rows: Dataset, count: int) -> None:
    """Write the avatars to train on and those held out as a folder of images with lists of their attributes."""
    for split, first, last in (("train", 0, count), ("validation", count, count + HELD_OUT)):
        folder = FOLDER / source / split
        if (folder / "metadata.csv").is_file():
            continue
        folder.mkdir(parents=True)
        with (folder / "metadata.csv").open("w", newline="") as file:
            columns = [name for name in rows.column_names if name not in ("id", "image")]
            writer = csv.DictWriter(file, ["file_name", *columns])
            writer.writeheader()
            for number, row in enumerate(rows.select(range(first, last))):
                row.pop("image").save(folder / f"{number:04}.png")
                row.pop("id")
                writer.writerow({"file_name": f"{number:04}.png", **row})


def save_faces(names: list[str]) -> None:
    """Save a grid with a row of ten faces for each setting."""
    images = []
    for name in names:
        pipeline = load_pipeline(str(run_folder(name)))
        sampling = SAMPLING[pipeline.transformer.config.patch_size] | {"guidance_scale": 1.0}
        pixels = generate_images(pipeline, range(10), None, seed=1, **sampling)
        images += [Image.fromarray(face) for face in pixels]
    lines = (name.replace(" from", "\nfrom").replace(", patches", "\npatches") for name in names)
    captions = [caption for name in lines for caption in (name, *[""] * 9)]
    save_grid(make_grid(images, 10, captions, min_side=96), RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
