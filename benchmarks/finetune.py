"""Fine-tune a model on 300 images of what it has never seen: distance, share of hats, minutes and megabytes.

python benchmarks/finetune.py     (half an hour on 2 idle cores; a second call goes on with the next model)

A model is trained on 6,310 avatars without hats by the demo's recipe, and then on 300 avatars with hats, by a user's
commands: all of its weights by `dit-hf train small --model.init_from`, and a LoRA by examples/lora.py. No attribute
tells of hats. 500 samples of each model, for the attributes of 650 other avatars with hats, are compared with these;
so are 500 more of them, as the best that a model can reach. A probe recognizes hats. A copy is a sample that is
nearer to a training image than 99 of 100 of the 650 avatars are.
Results are written to results/finetune.json, and a row of faces a model to docs/images/finetune.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from image_features import features_of
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
TUNED, HELD_OUT, NEW, SAMPLES, FACES, HAT = 300, 100, 650, 500, 8, "Wearing_Hat"
SAMPLING = {"seed": 0, "guidance_scale": 2.0, "num_inference_steps": 15}
WEIGHTS, ADAPTER = "pipeline/transformer/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
# The commands that train the models, and the weights that they save.
COMMANDS = {
    "before": "dit-hf train avatars --data.latents runs/hats/latents --train.output_dir runs/hats/before "
    "--train.max_train_steps 1500 --train.sampling_steps 0 --train.report_to none",
    "all weights": "dit-hf train small --data.latents runs/hats/hats-latents --train.output_dir runs/hats/all-weights "
    "--model.init_from runs/hats/before --optim.learning_rate 1e-3 --train.max_train_steps 400 "
    "--train.sampling_steps 0 --train.report_to none",
    "LoRA": "accelerate launch examples/lora.py --model runs/hats/before/pipeline --latents runs/hats/hats-latents "
    "--output_dir runs/hats/lora --learning_rate 3e-3",
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
    models = json.loads(RESULTS.read_text())["models"] if RESULTS.is_file() else {}
    avatars = dit_hf.open_images("avatars", resolution=64, num_images=8000, seed=0)
    without, hats = (avatars.select(np.flatnonzero(np.equal(avatars[HAT], worn))) for worn in (0, 1))
    tuned, held_out, new = np.split(np.arange(len(hats)), [TUNED, TUNED + HELD_OUT])
    prepare("latents", {"train": without})
    prepare("hats-latents", {"train": hats.select(tuned), "validation": hats.select(held_out)}, "--flip")
    for name in COMMANDS:
        if name not in models:
            models[name] = train(name)
            save(models)

    measure = Measurement(hats.select(tuned), hats.select(held_out), without.select(range(600)), hats.select(new))
    models["real avatars"] = measure(measure.others)
    for name in COMMANDS:
        models[name] |= measure(measure.samples(load(name)))
        save(models)
    save_faces(measure)


def save(models: dict[str, Any]) -> None:
    protocol = {"machine": machine(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    results = {**protocol, "samples": SAMPLES, "sampling": SAMPLING, "models": models}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(models, indent=2), flush=True)


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
    """Run the command of a model; return its minutes, by the clock and of CPUs, and the size of what it saves."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run(COMMANDS[name].split())
    minutes, after = (time.monotonic() - began) / 60, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "command": COMMANDS[name],
        "minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_seconds / 60, 1),
        "megabytes": round((FOLDER / SAVED[name]).stat().st_size / 1e6, 2),
    }


def load(name: str) -> LatentDiTPipeline:
    """Load the model of a name."""
    pipeline = load_pipeline(str(FOLDER / ("all-weights" if name == "all weights" else "before")))
    if name == "LoRA":
        pipeline.transformer.load_lora_adapter(str(FOLDER / "lora"), prefix=None, weight_name=ADAPTER)
    return pipeline


class Measurement:
    """Comparison of images with the first 650 of `new`, avatars with hats; `others` are the features of the other 500.

    The probe of hats is trained on `tuned`, `held_out` and `without`.
    """

    def __init__(self, tuned: Dataset, held_out: Dataset, without: Dataset, new: Dataset):
        self.net = load_features("efficientnet-lite0")
        self.requested = [*new.select(range(NEW)).remove_columns(["id", "image", HAT])]
        self.tuned, features = self.features(tuned), self.features(new)
        self.real, self.others = features[:NEW], features[NEW : NEW + SAMPLES]
        self.near = np.quantile(nearest(self.real, self.tuned)[0], 0.01)
        judged = [self.tuned, self.features(held_out), self.features(without)]
        worn = np.repeat([1, 1, 0], [len(part) for part in judged])
        self.head = train_head(np.concatenate(judged), {HAT: worn})

    def __call__(self, features: np.ndarray) -> dict[str, Any]:
        return {
            "frechet_distance": round(frechet_distance(features, self.real), 1),
            "hats": round(float(self.head.predict(features)[HAT].mean()), 3),
            "copies": float(np.mean(nearest(features, self.tuned)[0] < self.near)),
            "probe_accuracy": round(self.head.held_out[HAT], 4),
        }

    def features(self, rows: Dataset) -> np.ndarray:
        """Return the features of images, float32 [n, dim]."""
        return features_of(self.net, rows["image"])

    def samples(self, pipeline: LatentDiTPipeline) -> np.ndarray:
        """Return the features of samples for the attributes of new avatars, float32 [n, dim]."""
        return np.concatenate([self.net(self.images(pipeline, part)) for part in batches(SAMPLES, 50)])

    def images(self, pipeline: LatentDiTPipeline, numbers: range) -> np.ndarray:
        return generate_images(pipeline, numbers, self.requested, **SAMPLING)


def save_faces(measure: Measurement) -> None:
    """Save a grid with a row of eight faces for each model, always from the same noise and attributes."""
    faces = [face for name in COMMANDS for face in measure.images(load(name), range(FACES))]
    grid = make_grid([Image.fromarray(face).resize((96, 96), Image.Resampling.BICUBIC) for face in faces], FACES)
    save_grid(grid.quantize(256), GRID)


if __name__ == "__main__":
    main()
