"""Check that a training run killed with SIGKILL at random moments ends with the same bits as an undisturbed one.

python benchmarks/kill.py [--kills 100] [--json FILE]         (100 kills: about ten minutes on 2 cores)
python benchmarks/kill.py --gpu [--json FILE]                 (one GPU, fp16, the reference size: three minutes)

It compares weights, EMA and optimizer of the last checkpoint, bit by bit, and the log except for its columns of speed
and memory. The exit code is 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine

from dit_hf.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from dit_hf.latents.prepare import prepare_latents
from dit_hf.runs import RunFolder, read_log
from dit_hf.storage import sha256
from dit_hf.training.trainer import train

VARYING = {"images_per_second", "mfu", "peak_memory_gib"}
# When a process is killed, as shares of the time that a whole run takes. On a GPU much of it goes by before a step.
SHARES = {False: (0.05, 0.4), True: (0.25, 0.45)}
FILES = ("transformer.safetensors", "ema.safetensors", "optimizer.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments.")
    options = parser.parse_args()
    kills = options.kills or (4 if options.gpu else 100)
    path = options.json or Path(f"benchmarks/results/kill{'-gpu' if options.gpu else ''}.json")
    with tempfile.TemporaryDirectory() as scratch:
        config = reference(Path(scratch)) if options.gpu else tiny(Path(scratch))
        result = compare(config, kills, SHARES[options.gpu], options.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0 if result["same_bits"] and result["same_log"] else 1


def tiny(scratch: Path) -> Config:
    """400 steps of a model of 30 thousand parameters, on the CPU, with a checkpoint every five."""
    return Config(
        data=DataConfig(latents=cache(scratch, 300, "64")),
        model=ModelConfig(preset="tiny", num_layers=2, num_attention_heads=2, attention_head_dim=16),
        objective=ObjectiveConfig(),
        optim=OptimConfig(learning_rate=1e-3, lr_warmup_steps=20, ema_decay=0.99),
        train=TrainConfig(
            output_dir=str(scratch / "whole"),
            max_train_steps=400,
            global_batch_size=8,
            checkpointing_steps=5,
            validation_images=2,
            logging_steps=2,
            sampling_steps=0,
            num_inference_steps=2,
            report_to="none",
        ),
    )


def reference(scratch: Path) -> Config:
    """800 steps of the reference size in fp16, on a GPU, by kernels that give the same bits each time."""
    return Config(
        data=DataConfig(latents=cache(scratch, 2_000, "128")),
        model=ModelConfig(preset="reference"),
        objective=ObjectiveConfig(),
        optim=OptimConfig(learning_rate=1e-4, lr_warmup_steps=200, ema_decay=0.999),
        train=TrainConfig(
            output_dir=str(scratch / "whole"),
            max_train_steps=800,
            global_batch_size=64,
            mixed_precision="fp16",
            deterministic=True,
            checkpointing_steps=80,
            logging_steps=20,
            sampling_steps=0,
            report_to="none",
        ),
    )


def cache(scratch: Path, num_images: int, resolution: str) -> str:
    folder = scratch / "latents"
    prepare_latents(
        source="avatars",
        vae="avatar",
        resolution=resolution,
        flip=True,
        num_images=num_images,
        output_dir=str(folder),
    )
    return str(folder)


def compare(config: Config, kills: int, shares: tuple[float, float], seed: int) -> dict[str, Any]:
    """Train once undisturbed, then with `kills` kills in as many runs as needed, and compare the end of each run."""
    rng, whole, end = random.Random(seed), Path(config.train.output_dir), f"checkpoint-{config.train.max_train_steps}"
    seconds = launch(config, None)
    ends = {"same_bits": True, "same_log": True}
    killed: list[dict[str, Any]] = []
    runs = 0
    while len(killed) < kills:
        runs += 1
        config.train.output_dir = str(whole.with_name(f"killed-{runs}"))
        config.train.resume_from_checkpoint = "latest"
        run = Path(config.train.output_dir)
        # Several kills in a run.
        while len(killed) < kills and launch(config, rng.uniform(*shares) * seconds) is None:
            killed.append(state_after_kill(run))
        launch(config, None)
        ends["same_bits"] &= all(sha256(run / end / name) == sha256(whole / end / name) for name in FILES)
        ends["same_log"] &= log(run) == log(whole)
        history = [row["loss_scale"] for row in read_log(run) if row["loss_scale"]]
        shutil.rmtree(run)
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "steps": config.train.max_train_steps,
        "checkpointing_steps": config.train.checkpointing_steps,
        "deterministic": config.train.deterministic,
        "unbroken_seconds": round(seconds or 0, 1),
        "runs": runs,
        "kills": len(killed),
        "kills_before_the_first_checkpoint": sum(each["checkpoint"] is None for each in killed),
        "kills_while_saving": sum(each["saving"] for each in killed),
        "last_loss": float(read_log(whole)[-1]["loss"]),
        "loss_scale": [value for i, value in enumerate(history) if not i or value != history[i - 1]],
        **ends,
    }


def launch(config: Config, limit: float | None) -> float | None:
    """Train in a new process that is killed after `limit` seconds; return its seconds, or None if it was killed."""
    # A fork server has everything imported already, so that the time is spent on training. CUDA does not
    # survive a fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["dit_hf.training.trainer"])
    process = context.Process(target=train, args=(config,))
    started = time.monotonic()
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    if process.exitcode == -signal.SIGKILL:
        return None
    if process.exitcode:
        raise SystemExit(f"training ended with {process.exitcode}")
    return time.monotonic() - started


def state_after_kill(run: Path) -> dict[str, Any]:
    """Return the last checkpoint that a kill left, and whether another was being written."""
    checkpoints = RunFolder(run).checkpoints()
    return {
        "checkpoint": checkpoints[-1].name if checkpoints else None,
        "saving": bool(list(run.glob(".checkpoint-*"))),
    }


def log(run: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in VARYING} for row in read_log(run)]


if __name__ == "__main__":
    sys.exit(main())
