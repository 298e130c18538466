"""Overhead of a run: the trainer between two checkpoints, against the same step on a batch that is already loaded.

python benchmarks/overhead.py [--size tiny] [--batch 16] [--blocks 7] [--json FILE]

The overhead is that of reader, log, progress bar and signal handling. Blocks of 50 steps of each alternate in one
process, with a row of the log in every block.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine

from dit_hf.config import PRESETS, Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from dit_hf.latents.prepare import prepare_latents
from dit_hf.training.trainer import Trainer

CUDA = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="reference" if CUDA else "tiny", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=200 if CUDA else 16)
    parser.add_argument(
        "--resolution", default="128" if CUDA else "64", help="Of the avatars; the side of latents is a quarter."
    )
    parser.add_argument("--steps", type=int, default=50, help="Of a block.")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    prepare_latents(
        source="avatars",
        vae="avatar",
        resolution=options.resolution,
        num_images=1_000,
        flip=True,
        output_dir=str(scratch / "latents"),
    )
    run, bare = trainer(options, scratch / "run"), trainer(options, scratch / "bare").step
    # The bare step gets the same batch every time.
    batch = bare.batches.get((0, 0), (0, 0))
    bare.batches.get = lambda key, following: batch  # type: ignore[method-assign]
    watched = Watched(run.step, bare, options.steps)
    run.step = watched  # type: ignore[assignment]
    run.fit(scratch / "run")
    whole, alone = watched.whole[1:], watched.alone[1:]  # the first block warms up
    images = options.steps * options.batch
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("size", "batch", "resolution", "steps", "blocks")},
        "trainer_images_per_second": round(images / statistics.median(whole), 1),
        "bare_step_images_per_second": round(images / statistics.median(alone), 1),
        "trainer_over_bare_step": round(statistics.median(a / w for w, a in zip(whole, alone, strict=True)), 4),
    }


def trainer(options: argparse.Namespace, run: Path) -> Trainer:
    return Trainer(
        Config(
            data=DataConfig(latents=str(run.parent / "latents")),
            model=ModelConfig(preset=options.size),
            objective=ObjectiveConfig(),
            optim=OptimConfig(),
            train=TrainConfig(
                output_dir=str(run),
                max_train_steps=options.steps * (options.blocks + 1) + 1,
                global_batch_size=options.batch,
                checkpointing_steps=10**9,
                logging_steps=options.steps,
                validation_images=0,
                sampling_steps=0,
                num_inference_steps=1,
                report_to="none",
            ),
        )
    )


class Watched:
    """The trainer's step, which after each block of steps takes as many bare ones, and times both."""

    def __init__(self, step: Any, bare: Any, length: int):
        self.step, self.bare, self.length = step, bare, length
        self.whole: list[float] = []
        self.alone: list[float] = []
        self.started = time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __call__(self, step: int) -> torch.Tensor:
        if step and step % self.length == 0:
            now = synchronized()
            self.whole.append(now - self.started)
            for i in range(self.length):
                self.bare(step + i)
            self.started = synchronized()
            self.alone.append(self.started - now)
        return self.step(step)


def synchronized() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
