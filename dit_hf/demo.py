"""`dit-hf demo`: from no data to an image grid of generated faces, offline, in about ten minutes on two CPU cores."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .config import Config
from .data.contents import SourceOptions
from .data.sources import AVATARS, open_source
from .image_grid import make_grid, save_grid, side_by_side
from .latents.cache import open_latents
from .latents.prepare import prepare_latents
from .pipelines.attributes import Attributes
from .pipelines.pipeline_latent_dit import LatentDiTPipeline
from .progress import quiet_libraries
from .recipe_file import read_config, recipe_path
from .runs import RunFolder
from .storage import write_text
from .training.muon import MuonAdamW
from .training.trainer import Trainer

NUM_IMAGES = 8000
GRID_SIZE = 64
TIMED_STEPS = 20
# How the grids are generated. Fresh noise in every step corrects errors of a model that was trained for minutes; few
# steps are then enough (measured: benchmarks/README.md, "How good are the demo's images?").
SAMPLING: dict[str, Any] = {"num_inference_steps": 12, "eta": 1.0}
# The easily visible attributes: line of the caption, name, word in the caption.
CAPTIONS = (
    (0, "Smiling", "smiling"),
    (1, "Eyeglasses", "glasses"),
    (1, "Wearing_Hat", "hat"),
    (1, "Mustache", "mustache"),
    (2, "Bald", "bald"),
    (2, "Black_Hair", "black hair"),
    (2, "Brown_Hair", "brown hair"),
    (2, "Blond_Hair", "blond hair"),
    (2, "Gray_Hair", "gray hair"),
)

NEXT = """The same for CelebA, with Kaggle's archive unpacked in celeba (a GPU helps):
  dit-hf prepare-latents celeba --crop celeba-178 --resolution 256 --flip --output_dir runs/celeba/latents
  dit-hf train celeba
  dit-hf sample runs/celeba-dit --output_dir faces
And with this model, in a browser, or as images like those of sheet.png:
  dit-hf app {run}
  dit-hf sample {run} --num_inference_steps {num_inference_steps} --eta {eta:g} --output_dir faces"""


def demo(output_dir: str = "runs/demo", minutes: float = 6.0, seed: int = 0) -> None:
    """Render avatars, encode them, train for about `minutes`, and make image grids with the trained pipeline, offline.

    Args:
        output_dir: The run's folder. An unfinished demo there is resumed; a finished one is left as it is.
        minutes: How long to train. The speed of the first 20 steps turns this into a number of steps, once.
        seed: Seed of the avatars, the initial weights and the training.

    Raises:
        ValueError: if `minutes` is not positive.
        CalledProcessError: if training or generation fails or is interrupted.
    """
    if minutes <= 0:
        raise ValueError(f"minutes={minutes} must be above 0")
    run = Path(output_dir)
    if (run / "sheet.png").is_file():
        print(f"the demo is finished: {run / 'sheet.png'} ({run / 'pipeline'} is the trained pipeline)")
        return

    # Images to latents; a finished cache is reused.
    latents = prepare_latents(
        source=AVATARS,
        vae="avatar-robust",
        resolution="64",
        num_images=NUM_IMAGES,
        seed=seed,
        output_dir=str(run / "latents"),
    )

    # The recipe is written once: a resumed demo must not measure the speed again and change its number of steps.
    if not RunFolder(run).config.is_file():
        config = _build_recipe(run, latents, seed)
        _fit_to_time(config, minutes * 60)
        write_text(RunFolder(run).config, config.to_yaml())

    # From here on it is an ordinary run. The grids are made in a process of their own, offline, which proves that the
    # exported pipeline loads.
    _run_module("dit_hf", "train", "--config", str(RunFolder(run).config), "--train.resume_from_checkpoint", "latest")
    _run_module("dit_hf.demo", str(run), HF_HUB_OFFLINE="1")

    print(f"\n{run} holds:")
    for name in ("sheet.png", "denoising.png", "pipeline", "samples", "loss_curve.png", "training_log.csv", "latents"):
        print(f"  {run / name}")
    print(f"\n{NEXT.format(run=run, **SAMPLING)}")


def _run_module(module: str, *args: str, **environment: str) -> None:
    """Run `python -P -m MODULE ARGS`, pass a SIGTERM on to it, and let it shut down gracefully on Ctrl-C.

    Raises:
        CalledProcessError: if the process fails or is interrupted.
    """
    # -P: a json.py in the current folder is not Python's.
    process = subprocess.Popen([sys.executable, "-P", "-m", module, *args], env={**os.environ, **environment})
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while process.returncode is None:
        # The terminal sends Ctrl-C to the child as well: keep waiting while it saves a checkpoint.
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
    signal.signal(signal.SIGTERM, previous_handler)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, module)


def make_grids(run: Path) -> None:
    """Load the exported pipeline of `run` and write `sheet.png` and `denoising.png`."""
    pipeline = DiffusionPipeline.from_pretrained(RunFolder(run).pipeline)
    pipeline.set_progress_bar_config(disable=True)
    # Request the attributes of avatars of another seed, which the model has not been trained on.
    _, info = open_latents(run / "latents")
    unseen = open_source(AVATARS, SourceOptions(num_images=GRID_SIZE, seed=info["settings"]["seed"] + 1)).rows
    requested: list[Attributes] = [
        {name: row[name] for name in info["conditions"]} for row in unseen.remove_columns("image")
    ]
    # One generator for both calls, so that the unconditional faces continue its sequence of random numbers.
    generator = torch.Generator().manual_seed(0)
    conditional = pipeline(requested, generator=generator, **SAMPLING).images
    unconditional = pipeline(batch_size=16, generator=generator, **SAMPLING).images
    captions = ["\n".join(_caption_lines(row)) for row in requested]
    left = make_grid(conditional, 8, captions, "requested attributes (the visible ones)", min_side=96)
    right = make_grid(unconditional, 2, ["\n\n"] * len(unconditional), "unconditional", min_side=96)
    # `sheet.png` marks the demo as finished, so it is written last.
    save_grid(_make_denoising_grid(pipeline, requested[:8]), run / "denoising.png")
    save_grid(side_by_side(left, right), run / "sheet.png")


def _build_recipe(run: Path, latents: Path, seed: int) -> Config:
    config = read_config(recipe_path("avatars.yaml"))
    config.data.latents = str(latents)
    config.train.output_dir = str(run)
    config.train.seed = seed
    config.train.report_to = "none"
    return config


def _fit_to_time(config: Config, seconds: float) -> None:
    """Set the precision and the number of steps that fit into `seconds`, by timing 20 steps of a discarded run."""
    trainer = Trainer(config)
    if trainer.device.type == "cuda":
        config.train.mixed_precision = "fp16"
        step_seconds = _time_step(trainer, torch.float16)
    else:
        # bfloat16 is faster by a third or more on CPUs that compute in it, and slower on all others.
        step_seconds = _time_step(trainer, None)
        bf16_seconds = _time_step(trainer, torch.bfloat16)
        if bf16_seconds < step_seconds:
            config.train.mixed_precision = "bf16"
            step_seconds = bf16_seconds
    config.train.max_train_steps = max(TIMED_STEPS, round(seconds / step_seconds))
    print(f"{step_seconds * 1000:.0f} ms a step, {config.train.mixed_precision or 'float32'}: training for ", end="")
    print(f"{config.train.max_train_steps} steps", flush=True)


def _time_step(trainer: Trainer, dtype: torch.dtype | None) -> float:
    """Return the median seconds of 20 steps, or of fewer once ten seconds have passed."""
    optimizer = trainer.step.optimizer
    # Muon chooses its precision when it is built; set the one that a run with this autocast would have.
    if isinstance(optimizer, MuonAdamW) and trainer.device.type == "cpu":
        optimizer.dtype = dtype or torch.float32
    with torch.autocast(trainer.device.type, dtype, enabled=dtype is not None):
        # `.item()` waits for the device. The first step is slower: it allocates the optimizer's state.
        trainer.step(0).item()
        durations: list[float] = []
        while len(durations) < TIMED_STEPS and sum(durations) < 10:
            started = time.monotonic()
            trainer.step(len(durations) + 1).item()
            durations.append(time.monotonic() - started)
    return statistics.median(durations)


def _caption_lines(row: Attributes) -> list[str]:
    """Return one to three short lines that name the easily visible attributes of a row."""
    lines = [["man" if row["Male"] else "woman"], [], []]
    for line, name, word in CAPTIONS:
        if row[name]:
            lines[line].append(word)
    return [", ".join(line) for line in lines if line]


def _make_denoising_grid(pipeline: LatentDiTPipeline, requested: list[Attributes]) -> Image.Image:
    """Make a grid with one row a face: its latents, decoded, on their way from noise to the image."""
    stages: list[torch.Tensor] = []  # [faces, channels, height, width] after each step

    def record(_pipe: LatentDiTPipeline, _step: int, _timestep: torch.Tensor, tensors: dict) -> dict:
        stages.append(tensors["latents"])
        return tensors

    generator = torch.Generator().manual_seed(1)
    pipeline(requested, generator=generator, callback_on_step_end=record, output_type="latent", **SAMPLING)
    columns = [pipeline.decode_latents(latents) for latents in stages]
    images = [column[row] for row in range(len(requested)) for column in columns]
    return make_grid(images, len(columns), title="from noise to image, step by step", min_side=96)


if __name__ == "__main__":
    quiet_libraries()
    make_grids(Path(sys.argv[1]))
