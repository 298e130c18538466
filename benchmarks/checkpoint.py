"""Cost of one checkpoint by size of the model, compared with merely writing as many bytes to the same disk.

`wait` is what training waits for; `save` ends when the checkpoint stands, for which it waited in version 0.1.0.

python benchmarks/checkpoint.py [--presets reference S/2 B/2 L/2] [--json FILE] [--scratch DIR]

Two minutes and 9 GB of disk below --scratch for `reference`; L/2 needs 36 GB and 16 GB of memory.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine

from dit_hf.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from dit_hf.latents.prepare import prepare_latents
from dit_hf.training.checkpoint import find_checkpoint
from dit_hf.training.trainer import Trainer

MINUTES = 10
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["reference"])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    result = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for preset in options.presets:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            result[preset] = measure(Path(scratch), preset)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(folder: Path, preset: str) -> dict[str, Any]:
    trainer = open_trainer(folder, preset)
    trainer.step(0)  # allocates the optimizer's moments
    run = folder / "run"
    run.mkdir()
    size = trainer.tensors.bytes()
    times: dict[str, list[float]] = {"gather": [], "wait": [], "save": [], "write_only": [], "check": [], "load": []}
    for step in range(1, ROUNDS + 1):
        times["gather"].append(seconds(trainer.tensors.gather))
        times["wait"].append(seconds(lambda step=step: trainer._save(run, step, {}, print)))
        times["save"].append(times["wait"][-1] + seconds(trainer.saving.wait))
        times["write_only"].append(seconds(lambda: write(folder / "raw", size)))
        times["check"].append(seconds(lambda: find_checkpoint(run, "latest")))
        times["load"].append(seconds(lambda: trainer.tensors.load(find_checkpoint(run, "latest"))))
    median = {f"{name}_seconds": round(statistics.median(values), 2) for name, values in times.items()}
    ratios = [save / raw for save, raw in zip(times["save"], times["write_only"], strict=True)]
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in trainer.transformer.parameters()),
        "checkpoint_gb": round(size / 1e9, 2),
        **median,
        "save_over_write_only": round(statistics.median(ratios), 2),
        f"share_of_{MINUTES}_minutes": round(statistics.median(times["wait"]) / (60 * MINUTES), 4),
        "worst_share": round(max(times["wait"]) / (60 * MINUTES), 4),
    }


def open_trainer(folder: Path, preset: str) -> Trainer:
    """Build a trainer on latents [4, 32, 32]."""
    prepare_latents(
        source="avatars", vae="avatar", resolution="128", num_images=64, output_dir=str(folder / "latents")
    )
    return Trainer(
        Config(
            data=DataConfig(latents=str(folder / "latents")),
            model=ModelConfig(preset=preset),
            objective=ObjectiveConfig(),
            optim=OptimConfig(),
            train=TrainConfig(
                output_dir=str(folder / "run"), global_batch_size=2, validation_images=0, report_to="none"
            ),
        )
    )


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write(path: Path, size: int) -> None:
    """Write random bytes, which no file system compresses."""
    payload = os.urandom(2**24)
    with open(path, "wb") as file:
        for _ in range(-(-size // len(payload))):
            file.write(payload)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
