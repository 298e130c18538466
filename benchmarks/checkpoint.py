"""Cost of one checkpoint of the reference size, compared with merely writing as many bytes to the same disk.

`wait` is what training waits for, `save` ends when the checkpoint stands.

python benchmarks/checkpoint.py [--json FILE] [--scratch DIR]     (about two minutes, 9 GB of disk below --scratch)
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
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = measure(Path(scratch))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(folder: Path) -> dict[str, Any]:
    trainer = reference(folder)
    trainer.step(0)  # allocates the optimizer's moments
    run = folder / "run"
    run.mkdir()
    size = trainer.tensors.bytes()
    # Random bytes, which no file system compresses.
    payload = os.urandom(2**24) * -(-size // 2**24)
    times: dict[str, list[float]] = {"gather": [], "wait": [], "save": [], "write_only": [], "check": [], "load": []}
    for step in range(1, ROUNDS + 1):
        times["gather"].append(seconds(trainer.tensors.gather))
        times["wait"].append(seconds(lambda step=step: trainer._save(run, step, {}, print)))
        times["save"].append(times["wait"][-1] + seconds(trainer.saving.wait))
        times["write_only"].append(seconds(lambda: write(folder / "raw", payload[:size])))
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


def reference(folder: Path) -> Trainer:
    """Build a trainer of the reference size on latents [4, 32, 32]."""
    prepare_latents(
        source="avatars", vae="avatar", resolution="128", num_images=64, output_dir=str(folder / "latents")
    )
    return Trainer(
        Config(
            data=DataConfig(latents=str(folder / "latents")),
            model=ModelConfig(preset="reference"),
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


def write(path: Path, payload: bytes) -> None:
    with open(path, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
