"""Training on several GPUs of one machine: rate by ranks, losses against one rank, and a kill.

python benchmarks/multi_gpu.py [--ranks 1 2 4 8] [--json FILE]   (all GPUs; without one, two ranks on the CPU by gloo)

Every run is `torchrun scripts/train.py`, as a user starts it. The rate is measured with the same batch on each rank.
The losses are those of 50 steps with one global batch, whatever the number of ranks. Then all processes of a run are
killed with SIGKILL, and the resumed run must end with the same bits as an undisturbed one. The exit code is 1 if it
does not, or if the losses differ by more than a thousandth.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from kill import FILES, cache, log
from machine import machine

from dit_hf.runs import RunFolder, read_log
from dit_hf.storage import sha256

CUDA = torch.cuda.is_available()
SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
BATCH, IMAGES, RESOLUTION, PRESET = (200, 2_000, "128", "reference") if CUDA else (8, 200, "64", "tiny")
STEPS = {"rate": 300, "losses": 50, "kill": 400} if CUDA else {"rate": 20, "losses": 10, "kill": 60}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = torch.cuda.device_count() if CUDA else 2
    parser.add_argument("--ranks", type=int, nargs="+", default=[n for n in (1, 2, 4, 8) if n <= count])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options.ranks, Path(scratch))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["same_bits_after_a_kill"] and result["largest_difference_of_losses"] < 1e-3 else 1


def measure(ranks: list[int], scratch: Path) -> dict[str, Any]:
    latents, most = cache(scratch, IMAGES, RESOLUTION), max(ranks)
    rates, losses = {}, {}
    for n in ranks:
        finish(start(scratch / f"rate-{n}", n, latents, STEPS["rate"], BATCH * n))
        rates[n] = statistics.median(float(row["images_per_second"]) for row in read_log(scratch / f"rate-{n}")[1:])
        finish(start(scratch / f"losses-{n}", n, latents, STEPS["losses"], BATCH * most, logging_steps=1))
        losses[n] = [float(row["loss"]) for row in read_log(scratch / f"losses-{n}")]
    one = losses[min(ranks)]
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "preset": PRESET,
        "batch_of_a_rank": BATCH,
        "images_per_second": {n: round(rate, 1) for n, rate in rates.items()},
        "share_of_linear": {n: round(rate / n / rates[min(ranks)] * min(ranks), 3) for n, rate in rates.items()},
        "largest_difference_of_losses": max(
            abs(a / b - 1) for n in ranks for a, b in zip(losses[n], one, strict=True)
        ),
        "same_bits_after_a_kill": kill(scratch, most, latents),
    }


def kill(scratch: Path, ranks: int, latents: str) -> bool:
    """Kill a run after its second checkpoint, resume it, and compare it with an undisturbed one."""
    steps = STEPS["kill"]
    whole, killed = scratch / "whole", scratch / "killed"
    options = {"checkpointing_steps": steps // 10, "deterministic": True, "resume_from_checkpoint": "latest"}
    finish(start(whole, ranks, latents, steps, BATCH * ranks, **options))
    process = start(killed, ranks, latents, steps, BATCH * ranks, **options)
    while process.poll() is None and len(RunFolder(killed).checkpoints()) < 2:
        time.sleep(0.05)
    # torchrun starts its ranks in sessions of their own: each has to be killed.
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()
    finish(start(killed, ranks, latents, steps, BATCH * ranks, **options))
    end = f"checkpoint-{steps}"
    same = all(sha256(killed / end / name) == sha256(whole / end / name) for name in FILES)
    return same and log(killed) == log(whole)


def start(
    run: Path, ranks: int, latents: str, steps: int, global_batch_size: int, **train: Any
) -> subprocess.Popen[bytes]:
    """Start a training of `ranks` ranks in the folder `run`."""
    settings = {
        "output_dir": run,
        "max_train_steps": steps,
        "global_batch_size": global_batch_size,
        "logging_steps": max(1, steps // 10),
        "checkpointing_steps": steps,
        "checkpoints_total_limit": 2,
        "validation_images": 0,
        "sampling_steps": 0,
        "report_to": "none",
        "mixed_precision": "fp16" if CUDA else "no",
        **train,
    }
    arguments = [f"--train.{name}={value}" for name, value in settings.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, str(SCRIPT), f"--data.latents={latents}", f"--model.preset={PRESET}", *arguments]
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"a run ended with {process.returncode}")


if __name__ == "__main__":
    sys.exit(main())
