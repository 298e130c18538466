"""Faces by minute of training: the demo's recipe at 30 s, 1, 2, 4 and 6 minutes of its six, with the same noise.

python benchmarks/minutes.py LATENTS [--steps 996]      (LATENTS is the demo's cache; ten minutes of two cores)

The demo takes as many steps as fit into six minutes; here their number is given, so a minute is a sixth of them. All
rows are checkpoints of one training. Each row's distance is that of benchmarks/demo.py. Results are written to
results/minutes.json and docs/images/minutes.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch
from avatar_classifier import avatars, train_classifier
from demo import measure
from machine import machine
from manipulation import rows_of
from PIL import Image

import dit_hf
from dit_hf.demo import SAMPLING
from dit_hf.evaluation.features import load_features
from dit_hf.image_grid import make_grid, save_grid
from dit_hf.recipe_file import read_config, recipe_path
from dit_hf.runs import load_pipeline
from dit_hf.sampling.generate import generate_images

ROOT = Path(__file__).parents[1]
SEED, FACES = 7, 10
SHARES = {"30 s": 1, "1 minute": 2, "2 minutes": 4, "4 minutes": 8, "6 minutes": 12}  # in twelfths of the training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents")
    parser.add_argument("--steps", type=int, default=996, help="Of the training, divisible by 12.")
    parser.add_argument("--run", type=Path, default=Path("runs/minutes"))
    options = parser.parse_args()
    config = read_config(recipe_path("avatars"))
    config.data.latents = options.latents
    train = config.train
    train.output_dir, train.max_train_steps = str(options.run), options.steps
    train.checkpointing_steps, train.checkpoints_total_limit = options.steps // 12, 12
    train.validation_images = train.sampling_steps = 0
    train.report_to, train.resume_from_checkpoint = "none", "latest"
    dit_hf.train(config)

    net, classifier = load_features("efficientnet-lite0"), train_classifier()
    requested = rows_of(avatars(SEED, FACES)[1])
    faces, captions, distances = [], [], {}
    for label, twelfths in SHARES.items():
        pipeline = load_pipeline(str(options.run / f"checkpoint-{twelfths * options.steps // 12}"))
        sampling = {"guidance_scale": pipeline.config.guidance_scale, **SAMPLING}
        faces += map(Image.fromarray, generate_images(pipeline, range(FACES), requested, SEED, **sampling))
        captions += [label, *[""] * (FACES - 1)]
        distances[label] = measure(pipeline, net, classifier, sampling)
        print(label, json.dumps(distances[label]), flush=True)
    save_grid(make_grid(faces, FACES, captions, min_side=96), ROOT / "docs" / "images" / "minutes.png")
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "steps": options.steps,
        "sampling": sampling,
        "by_minute": distances,
    }
    (ROOT / "benchmarks" / "results" / "minutes.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
