"""The largest batch that trains on a GPU with less memory than this one: torch's share of it is capped.

python benchmarks/small_gpu.py --memory 8 [--recipe celeba] [--json FILE]         (one GPU, about a minute)

--memory is in GiB; 0.6 GiB of it are left to CUDA itself, which torch's cap does not cover. Two eager batches give the
bytes for an image, hence a first guess; then compiled steps (the trainer's default on a GPU) run with larger and
larger batches until memory runs out. This shows what fits, not how fast a smaller GPU is.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine
from train_step import ours, prepare

CONTEXT = 0.6 * 2**30
GROWTH = 1.06


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, required=True, help="GiB of the smaller GPU.")
    parser.add_argument("--recipe", default="celeba", choices=["celeba", "celeba-l1"])
    parser.add_argument("--size", default="reference")
    parser.add_argument("--latent", type=int, default=32, help="Side of the latents.")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((options.memory * 2**30 - CONTEXT) / total)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, prepare(Path(scratch) / "latents", options.latent))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    small, large = (peak_bytes(options, folder, batch, compiled=False) for batch in (8, 24))
    if not (small and large):
        raise SystemExit("not even 24 images fit")
    image = (large - small) / 16
    room = options.memory * 2**30 - CONTEXT
    batch = eager = int((room - (small - 8 * image)) / image)
    compiled: dict[int, float] = {}
    while peak := peak_bytes(options, folder, batch, compiled=True):
        compiled[batch] = round(peak / 2**30, 2)
        print(f"{batch} images: {compiled[batch]} GiB", flush=True)
        batch = int(batch * GROWTH) + 1
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("memory", "recipe", "size", "latent", "precision")},
        "mib_an_image_eager": round(image / 2**20, 1),
        "largest_batch_eager_by_these": eager,
        "peak_gib_of_compiled_batches": compiled,
        "too_large_compiled": batch,
    }


def peak_bytes(options: argparse.Namespace, folder: str, batch: int, compiled: bool) -> int | None:
    """Return the memory that three steps reserve at most, or None if it does not suffice."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = None
    try:
        step = ours(argparse.Namespace(**{**vars(options), "batch": batch}), folder, options.recipe, compiled)
        for i in range(3):
            step(i)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


if __name__ == "__main__":
    main()
