"""Images a second of the training step against batch size and tokens, compared with a constant arithmetic rate.

python benchmarks/growth.py [--size tiny] [--json FILE] [--plot FILE]          (about five minutes on 2 cores)
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine
from matplotlib.figure import Figure
from train_step import CUDA, ours, prepare, seconds

from dit_hf.config import PRESETS
from dit_hf.training.throughput import flops_per_image

BATCHES = (1, 4, 16, 64, 256) if CUDA else (1, 2, 4, 8, 16, 32, 64)
SIDES = (16, 32, 48, 64)
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="reference" if CUDA else "tiny", choices=list(PRESETS))
    parser.add_argument("--precision", default="fp16" if CUDA else "no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/growth.json"))
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/results/growth.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        by_batch = [point(options, Path(scratch), batch, SIDES[0]) for batch in BATCHES]
        tokens = BATCHES[-2] * (SIDES[0] // 2) ** 2
        by_side = [point(options, Path(scratch), max(1, tokens // (side // 2) ** 2), side) for side in SIDES]
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "size": options.size,
        "precision": options.precision,
        "by_batch": by_batch,
        "by_tokens": by_side,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, options.plot)
    print(json.dumps(result, indent=2))


def point(options: argparse.Namespace, scratch: Path, batch: int, side: int) -> dict[str, Any]:
    """Return the median speed of a step on a batch of latents [4, side, side]."""
    folder = scratch / f"latents-{side}"
    if not folder.exists():
        prepare(folder, side)
    options.batch = batch
    step = ours(options, str(folder), False)
    step(0)
    time = statistics.median(seconds(lambda: step(1 + i)) for i in range(ROUNDS))  # noqa: B023
    flops = flops_per_image(step.transformer.config)
    return {
        "batch": batch,
        "latent": side,
        "tokens": (side // 2) ** 2,
        "images_per_second": round(batch / time, 3),
        "gflops": round(flops * batch / time / 1e9, 1),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot both curves, and for each the line of its best arithmetic rate."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, x in ((left, "by_batch", "batch"), (right, "by_tokens", "tokens")):
        points = result[name]
        xs = [entry[x] for entry in points]
        best = max(entry["gflops"] for entry in points)
        ideal = [entry["images_per_second"] * best / entry["gflops"] for entry in points]
        axes.plot(xs, ideal, "--", color="#9aa5b1", label=f"at {best:g} GFLOP/s throughout")
        axes.plot(xs, [entry["images_per_second"] for entry in points], "o-", color="#2b6cb0", label="measured")
        for entry in points:
            position = (entry[x], entry["images_per_second"])
            axes.annotate(f"{entry['gflops']:.0f}", position, xytext=(4, -12), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel="images a second")
        axes.set_xticks(xs, [str(value) for value in xs])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.25)
        axes.legend()
    left.set_title(f"{result['size']}, 64 tokens (GFLOP/s beside the points)")
    right.set_title("as many tokens a step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
