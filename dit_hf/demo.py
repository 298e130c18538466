"""The demo: from nothing to faces on an image grid, offline, in about ten minutes on two CPU cores."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .config import Config, read_config, recipe_path
from .data.sources import AVATARS, open_source
from .image_grid import make_grid, save_grid, side_by_side
from .latents.cache import open_latents
from .latents.prepare import prepare_latents
from .pipelines.guidance import Attributes
from .pipelines.pipeline_latent_dit import LatentDiTPipeline
from .runs import RunFolder
from .storage import write_text
from .training.muon import MuonAdamW
from .training.trainer import Trainer

NUM_IMAGES = 8000
GRID_SIZE = 64
TIMED_STEPS = 20
# The line of the caption, the attribute, its word.
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
  dit-hf prepare-latents --source celeba --crop celeba-178 --resolution 256 --flip --output_dir runs/celeba/latents
  dit-hf train --config recipes/celeba.yaml
  dit-hf sample runs/celeba-dit --output_dir faces
And with this model, in a browser:
  dit-hf app {run}
(After `make demo` the commands are in .venv: `. .venv/bin/activate`.)"""


def demo(output_dir: str = "runs/demo", minutes: float = 6.0, seed: int = 0) -> None:
    """Render avatars, encode them, train for about `minutes`, and make image grids with the trained pipeline, offline.

    Args:
        output_dir: The run's folder. An unfinished demo there is resumed; a finished one is left as it is.
        minutes: How long to train; turned into a number of steps once, by the speed of the first 20.
        seed: Of avatars, weights and training.
    """
    if minutes <= 0:
        raise ValueError(f"minutes={minutes} must be above 0")
    run = Path(output_dir)
    if (run / "sheet.png").is_file():
        print(f"the demo is finished: {run / 'sheet.png'} ({run / 'pipeline'} is the trained pipeline)")
        return
    latents = prepare_latents(
        str(run / "latents"), AVATARS, vae="avatar", resolution="64", num_images=NUM_IMAGES, seed=seed
    )
    if not RunFolder(run).config.is_file():
        config = _recipe(run, latents, seed)
        _set_speed(config, minutes * 60)
        write_text(RunFolder(run).config, config.to_yaml())
    # From here on it is an ordinary run, and the image grids are drawn by a process that loads what it exported.
    _run("dit_hf", "train", "--config", str(RunFolder(run).config), "--train.resume_from_checkpoint", "latest")
    _run("dit_hf.demo", str(run), HF_HUB_OFFLINE="1")
    print(f"\n{run} holds:")
    for name in ("sheet.png", "denoising.png", "pipeline", "samples", "loss_curve.png", "training_log.csv", "latents"):
        print(f"  {run / name}")
    print(f"\n{NEXT.format(run=run)}")


def _run(module: str, *args: str, **environment: str) -> None:
    """`python -m MODULE ARGS`, which is let finish what it does on Ctrl-C, and told of a SIGTERM.

    Raises:
        CalledProcessError: if it fails, or was told to stop.
    """
    process = subprocess.Popen([sys.executable, "-m", module, *args], env={**os.environ, **environment})
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # the terminal has told it too
            process.wait()
    signal.signal(signal.SIGTERM, before)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, module)


def make_grids(run: Path) -> None:
    """Load the exported pipeline of `run` and draw `sheet.png` and `denoising.png`."""
    pipeline = DiffusionPipeline.from_pretrained(RunFolder(run).pipeline)
    pipeline.set_progress_bar_config(disable=True)
    _, info = open_latents(run / "latents")
    # What is asked for are the attributes of avatars that were never trained on.
    unseen = open_source(AVATARS, num_images=GRID_SIZE, seed=info["settings"]["seed"] + 1).rows
    asked: list[Attributes] = [
        {name: row[name] for name in info["conditions"]} for row in unseen.remove_columns("image")
    ]
    generator = torch.Generator().manual_seed(0)
    faces = pipeline(asked, generator=generator).images
    free = pipeline(batch_size=16, generator=generator).images
    captions = ["\n".join(_words(row)) for row in asked]
    left = make_grid(faces, 8, captions, "asked for these attributes, among others", min_side=96)
    right = make_grid(free, 2, ["\n\n"] * len(free), "asked for nothing", min_side=96)
    save_grid(_denoising(pipeline, asked[:8]), run / "denoising.png")
    save_grid(side_by_side(left, right), run / "sheet.png")  # last: where it is, the demo is finished


def _recipe(run: Path, latents: Path, seed: int) -> Config:
    config = read_config(recipe_path("avatars.yaml"))
    config.data.latents, config.train.output_dir, config.train.seed = str(latents), str(run), seed
    config.train.report_to = "none"
    return config


def _set_speed(config: Config, seconds: float) -> None:
    """Choose the precision and how many steps fit, by the time of 20 steps of a run that is thrown away."""
    trainer = Trainer(config)
    if trainer.device.type == "cuda":
        config.train.mixed_precision = "fp16"
        step_seconds = _time_step(trainer, torch.float16)
    else:
        # Where the CPU computes in bfloat16 that is faster by a third or more, elsewhere it is slower.
        step_seconds, bf16_seconds = _time_step(trainer, None), _time_step(trainer, torch.bfloat16)
        if bf16_seconds < step_seconds:
            config.train.mixed_precision, step_seconds = "bf16", bf16_seconds
    config.train.max_train_steps = max(TIMED_STEPS, round(seconds / step_seconds))
    print(f"{step_seconds * 1000:.0f} ms a step, {config.train.mixed_precision or 'float32'}: training for ", end="")
    print(f"{config.train.max_train_steps} steps", flush=True)


def _time_step(trainer: Trainer, dtype: torch.dtype | None) -> float:
    """Seconds a step takes: the median of 20, or of fewer once they have taken ten seconds."""
    optimizer = trainer.step.optimizer
    if isinstance(optimizer, MuonAdamW) and trainer.device.type == "cpu":
        optimizer.dtype = dtype or torch.float32  # as it will be in a run of that precision
    with torch.autocast(trainer.device.type, dtype, enabled=dtype is not None):
        trainer.step(0).item()  # the first step also sets things up
        taken: list[float] = []
        while len(taken) < TIMED_STEPS and sum(taken) < 10:
            started = time.monotonic()
            trainer.step(len(taken) + 1).item()
            taken.append(time.monotonic() - started)
    return statistics.median(taken)


def _words(row: Attributes) -> list[str]:
    """A caption of three short lines that says what is easy to see."""
    lines = [["man" if row["Male"] else "woman"], [], []]
    for line, name, word in CAPTIONS:
        if row[name]:
            lines[line].append(word)
    return [", ".join(line) for line in lines]


def _denoising(pipeline: LatentDiTPipeline, asked: list[Attributes]) -> Image.Image:
    """One row a face: the latents as decoded on the way from noise to the face."""
    stages: list[torch.Tensor] = []

    def keep(_pipe: LatentDiTPipeline, _step: int, _timestep: torch.Tensor, tensors: dict) -> dict:
        stages.append(tensors["latents"])
        return tensors

    pipeline(asked, generator=torch.Generator().manual_seed(1), callback_on_step_end=keep, output_type="latent")
    steps = [*range(0, len(stages) - 1, 3), len(stages) - 1]
    shown = [pipeline.decode_latents(stages[step]) for step in steps]
    images = [column[row] for row in range(len(asked)) for column in shown]
    return make_grid(images, len(steps), title="out of the noise, step by step", min_side=96)


if __name__ == "__main__":
    make_grids(Path(sys.argv[1]))
