"""Fine-tune a model on 300 images of what it has never seen: distance, share of hats, minutes and megabytes.

python benchmarks/finetune.py     (under an hour on 2 cores, most of it for the first model; a second call resumes)

A model is trained on 24,000 avatars without hats by the demo's recipe, and then on 300 avatars with hats, by a user's
commands: all of its weights by `dit-hf train small --model.init_from`, and a LoRA by examples/lora.py. No attribute
tells of hats. 500 samples of each model, for the attributes of other avatars with hats, are compared with these
avatars; a probe that is trained on real avatars of another seed recognizes hats. A copy is a sample nearer to a
training image than 99 of 100 new avatars are.
Results are written to results/finetune.json, and a row of faces a model to docs/images/finetune.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from machine import machine
from PIL import Image

import dit_hf
from dit_hf.evaluation.attribute_probe import train_head
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import frechet_distance, nearest
from dit_hf.image_grid import make_grid, save_grid
from dit_hf.pipelines.pipeline_latent_dit import LatentDiTPipeline
from dit_hf.runs import load_pipeline
from dit_hf.sampling.generate import batches, generate_images

FOLDER = Path("runs/hats")
RESULTS = Path(__file__).parent / "results" / "finetune.json"
GRID = Path(__file__).parents[1] / "docs" / "images" / "finetune.png"
RENDERED, WITHOUT_HATS, TUNED, HELD_OUT, NEW, SAMPLES, FACES = 32_000, 24_000, 300, 256, 1500, 500, 8
HAT, GUIDANCE = "Wearing_Hat", 2.0
WEIGHTS, ADAPTER = "pipeline/transformer/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
# The commands that train the models, and the weights that they save.
COMMANDS = {
    "before": "dit-hf train avatars --data.latents runs/hats/latents --train.output_dir runs/hats/before "
    "--train.max_train_steps 1500 --train.report_to none",
    "all weights": "dit-hf train small --data.latents runs/hats/hats-latents --train.output_dir runs/hats/all-weights "
    "--model.init_from runs/hats/before --optim.learning_rate 1e-3 --train.max_train_steps 400 --train.report_to none",
    "LoRA": "accelerate launch examples/lora.py --model runs/hats/before/pipeline --latents runs/hats/hats-latents "
    "--output_dir runs/hats/lora",
}
SAVED = {"before": f"before/{WEIGHTS}", "all weights": f"all-weights/{WEIGHTS}", "LoRA": f"lora/{ADAPTER}"}
# These programs, of the Python that runs this script.
PROGRAMS = {
    "dit-hf": [sys.executable, "-m", "dit_hf"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    avatars = dit_hf.open_images("avatars", resolution=64, num_images=RENDERED, seed=21)
    hats = avatars.select(np.flatnonzero(avatars[HAT]))
    prepare("latents", {"train": avatars.select(np.flatnonzero(np.equal(avatars[HAT], 0))[:WITHOUT_HATS])})
    tuned, validation = hats.select(range(TUNED)), hats.select(range(TUNED, TUNED + HELD_OUT))
    prepare("hats-latents", {"train": tuned, "validation": validation}, "--flip")

    measure = Measurement(tuned, hats.select(range(TUNED + HELD_OUT, TUNED + HELD_OUT + NEW + SAMPLES)))
    results["real avatars with hats"] = measure(measure.others)
    for name in COMMANDS:
        if name not in results:
            results[name] = {**train(name), **measure(measure.samples(load(name)))}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name], indent=2), flush=True)
    save_faces(measure)


def prepare(name: str, splits: dict[str, Dataset], *options: str) -> None:
    """Encode avatars as images of the user's own: one parquet file a split, which says nothing of hats."""
    if (FOLDER / name).is_dir():
        return
    images = FOLDER / f"{name}-images"
    images.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.remove_columns([HAT, "id"]).to_parquet(images / f"{split}.parquet")
    command = f"dit-hf prepare-latents {images} --resolution 64 --vae avatar --output_dir {FOLDER / name}"
    run([*command.split(), *options])


def run(command: list[str]) -> None:
    subprocess.run([*PROGRAMS[command[0]], *command[1:]], check=True)


def train(name: str) -> dict[str, Any]:
    """Run the command of a model, and return its minutes and the megabytes of the weights that it saves."""
    began = time.monotonic()
    run(COMMANDS[name].split())
    minutes, size = (time.monotonic() - began) / 60, (FOLDER / SAVED[name]).stat().st_size
    return {"command": COMMANDS[name], "minutes": round(minutes, 1), "megabytes": round(size / 1e6, 2)}


def load(name: str) -> LatentDiTPipeline:
    """Load the model of a name."""
    pipeline = load_pipeline(str(FOLDER / ("all-weights" if name == "all weights" else "before")))
    if name == "LoRA":
        pipeline.transformer.load_lora_adapter(str(FOLDER / "lora"), prefix=None, weight_name=ADAPTER)
    return pipeline


class Measurement:
    """Comparison of images with 1,500 new avatars that wear hats; `others` are the features of 500 more of these."""

    def __init__(self, tuned: Dataset, new: Dataset):
        self.net = load_features("efficientnet-lite0")
        self.requested = [*new.select(range(NEW)).remove_columns(["id", "image", HAT])]
        self.real, self.tuned = self.features(new.select(range(NEW))), self.features(tuned)
        self.others = self.features(new.select(range(NEW, NEW + SAMPLES)))
        self.near = np.quantile(nearest(self.real, self.tuned)[0], 0.01)
        judged = dit_hf.open_images("avatars", resolution=64, num_images=4000, seed=77)
        self.head = train_head(self.features(judged), {HAT: np.array(judged[HAT])})

    def __call__(self, features: np.ndarray) -> dict[str, Any]:
        return {
            "frechet_distance": round(frechet_distance(features, self.real), 1),
            "hats": round(float(self.head.predict(features)[HAT].mean()), 3),
            "copies": float(np.mean(nearest(features, self.tuned)[0] < self.near)),
            "probe_accuracy": round(self.head.held_out[HAT], 4),
            "samples": SAMPLES,
            "guidance_scale": GUIDANCE,
            "machine": machine(),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }

    def features(self, rows: Dataset) -> np.ndarray:
        """Return the features of images, float32 [n, dim]."""
        parts = (rows[start : start + 50]["image"] for start in range(0, len(rows), 50))
        return np.concatenate([self.net(np.stack([np.asarray(image) for image in part])) for part in parts])

    def samples(self, pipeline: LatentDiTPipeline) -> np.ndarray:
        """Return the features of samples for the attributes of new avatars, float32 [n, dim]."""
        return np.concatenate([self.net(self.images(pipeline, part)) for part in batches(SAMPLES, 50)])

    def images(self, pipeline: LatentDiTPipeline, numbers: range) -> np.ndarray:
        return generate_images(pipeline, numbers, self.requested, 0, guidance_scale=GUIDANCE)


def save_faces(measure: Measurement) -> None:
    """Save a grid with a row of eight faces for each model, always from the same noise and attributes."""
    faces = [face for name in COMMANDS for face in measure.images(load(name), range(FACES))]
    save_grid(make_grid([Image.fromarray(face) for face in faces], FACES), GRID)


if __name__ == "__main__":
    main()
