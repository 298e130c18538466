"""Train on few images: held-out loss, distance, and copies of training images, by setting.

python benchmarks/small_data.py MODEL [--only NAME ...]     (up to a quarter of an hour a setting on a core)

MODEL is `avatars-0` or `patch-4-0` of a race of benchmarks/races, a model of the same recipe.
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
from dit_hf import LatentDiTPipeline, demo
from dit_hf.config import TrainConfig
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import frechet_distance, nearest
from dit_hf.image_grid import make_grid, save_grid
from dit_hf.models.transformer_latent_dit import LatentDiTTransformer2DModel
from dit_hf.recipe_file import read_config, recipe_path
from dit_hf.runs import load_pipeline, read_log
from dit_hf.sampling.generate import batches, generate_images

FOLDER = Path("runs/small")
RESULTS = Path(__file__).parent / "results" / "small_data.json"
HELD_OUT, NEW, SAMPLES = 256, 1500, 500
SAMPLING: dict[str, Any] = {"guidance_scale": 2.0, **demo.SAMPLING}
EMAS = [0.99, 0.999]  # beside the one of the recipe
# Name: images, whether the training starts from MODEL, steps, and what differs from the recipe.
SETTINGS: dict[str, tuple[str, bool, int, dict[str, Any]]] = {
    "1,000": ("all-1000", False, 1500, {}),
    "1,000, a smaller model": ("all-1000", False, 1500, {"num_attention_heads": 2}),
    "300 hats": ("hats-300", False, 1500, {}),
    "300 hats, a smaller model": ("hats-300", False, 1500, {"num_attention_heads": 2}),
    "300 hats from the model, 1e-3": ("hats-300", True, 300, {"learning_rate": 1e-3}),
    "300 hats from the model, 3e-4": ("hats-300", True, 300, {"learning_rate": 3e-4}),
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
    config = read_config(recipe_path("small"))
    config.data.latents = str(
        dit_hf.prepare_latents(
            str(FOLDER / source), str(FOLDER / f"{source}-latents"), vae="avatar-robust", resolution="64", flip=True
        )
    )
    config.model.init_from = model if tuned else None
    config.model.num_attention_heads = changes.get("num_attention_heads")
    config.optim.learning_rate = changes.get("learning_rate", config.optim.learning_rate)
    config.optim.lr_warmup_steps = 20 if tuned else 100
    config.optim.extra_ema_decays = EMAS
    config.train = TrainConfig(
        output_dir=str(run_folder(name)),
        max_train_steps=steps,
        global_batch_size=config.train.global_batch_size,
        checkpointing_steps=steps // 10,
        logging_steps=steps // 10,
        validation_images=HELD_OUT,
        sampling_steps=0,
        resume_from_checkpoint="latest",
        mixed_precision="no",
        report_to="none",
    )
    run = dit_hf.train(config)

    judge = Judge(load_pipeline(str(run)), new, count)
    log, emas = [row for row in read_log(run) if row.get("validation_loss")], {}
    for decay in (config.optim.ema_decay, *EMAS):
        suffix = "" if decay == config.optim.ema_decay else f"-{decay:g}"
        folder = run / f"ema{suffix}" if suffix else run / "pipeline" / "transformer"
        losses = {int(row["step"]): float(row[f"validation_loss{suffix}"]) for row in log}
        emas[f"{decay:g}"] = {
            "validation_losses": losses,
            "lowest_at_step": min(losses, key=losses.__getitem__),
            **judge(LatentDiTTransformer2DModel.from_pretrained(folder)),
        }

    # Where the held-out loss rises again, the checkpoint of the lowest too; its EMA is the recipe's.
    best = emas[f"{config.optim.ema_decay:g}"]["lowest_at_step"]
    at_lowest = judge(load_pipeline(str(run / f"checkpoint-{best}")).transformer) if best < steps else None
    return {
        "images": count,
        "steps": steps,
        "parameters": judge.pipeline.transformer.num_parameters(),
        "initialized_from": Path(model).name if tuned else None,
        "learning_rate": config.optim.learning_rate,
        "emas": emas,
        "at_lowest_validation_loss": at_lowest,
        "samples": SAMPLES,
        "sampling": SAMPLING,
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


class Judge:
    """Measure of samples: their distance to new avatars whose attributes are requested, and the share of copies.

    Args:
        pipeline: The run's; its transformer is replaced by the one that is measured.
        images: Those of `avatars`.
        count: How many of them were trained on.
    """

    def __init__(self, pipeline: LatentDiTPipeline, images: Dataset, count: int):
        self.pipeline, self.net = pipeline, load_features("efficientnet-lite0")
        rows = images.select(range(count + HELD_OUT, len(images)))
        names = list(pipeline.transformer.config.conditions)
        self.requested = [{key: row[key] for key in names} for row in rows.remove_columns("image")]
        self.real = features_of(self.net, rows["image"])
        self.trained = features_of(self.net, images.select(range(count))["image"])
        self.near = np.quantile(nearest(self.real, self.trained)[0], 0.01)

    def __call__(self, transformer: LatentDiTTransformer2DModel) -> dict[str, float]:
        self.pipeline.transformer = transformer
        parts = batches(SAMPLES, 50)
        images = [generate_images(self.pipeline, part, self.requested, 0, **SAMPLING) for part in parts]
        samples = np.concatenate([self.net(part) for part in images])
        copies = float(np.mean(nearest(samples, self.trained)[0] < self.near))
        return {"frechet_distance": round(frechet_distance(samples, self.real), 1), "copies": copies}


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
        pixels = generate_images(pipeline, range(10), None, seed=1, **SAMPLING | {"guidance_scale": 1.0})
        images += [Image.fromarray(face) for face in pixels]
    lines = (name.replace(" from", "\nfrom").replace(", ", ",\n") for name in names)
    captions = [caption for name in lines for caption in (name, *[""] * 9)]
    save_grid(make_grid(images, 10, captions, min_side=96), RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
