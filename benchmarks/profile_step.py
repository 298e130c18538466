"""Time of a training step by kind of kernel, for the step that the trainer takes.

python benchmarks/profile_step.py [--size reference] [--batch 4] [--json FILE]         (a minute on 2 cores)

On a CPU it also reports the time that the step's matrix products alone would take at the ceiling of this machine, the
lower bound of any step in the same precision.
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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import CUDA, matmul_flops, ours, prepare, seconds

from dit_hf.config import PRESETS
from dit_hf.training.throughput import flops_per_image

KINDS = {  # parts of kernels' names; the first kind that matches counts
    "attention": ("attention", "flash", "fmha"),
    "average": ("lerp",),
    "optimizer": ("_fused_adamw", "multi_tensor_apply", "adam"),
    "matrix products": ("addmm", "aten::mm", "bmm", "linear_backward", "gemm", "cutlass", "nvjet", "cublas"),
    "normalisation": ("layer_norm",),
    "activation": ("gelu", "silu"),
}
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="reference", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=200 if CUDA else 4)
    parser.add_argument("--latent", type=int, default=32, help="Side of the latents.")
    parser.add_argument("--precision", default="fp16" if CUDA else "no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/profile_step.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        step = ours(options, prepare(Path(scratch) / "latents", options.latent), "celeba-l1", compiled=CUDA)
    result = measure(step, options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(step: Any, options: argparse.Namespace) -> dict[str, Any]:
    step(0)
    ceiling = max(matmul_flops(options) for _ in range(3))
    whole = statistics.median(seconds(lambda: step(1 + i)) for i in range(STEPS))  # noqa: B023
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=activities) as recorded:
        seconds(lambda: [step(10 + i) for i in range(STEPS)])
    times: dict[str, float] = {}
    spent = kernels(recorded)
    for name, time in spent.items():
        times[kind_of(name)] = times.get(kind_of(name), 0.0) + time
    total = sum(times.values())
    others = sorted((name for name in spent if kind_of(name) == "other"), key=lambda name: -spent[name])
    at_ceiling = flops_per_image(step.transformer.config) * options.batch / ceiling
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("size", "batch", "latent", "precision")},
        "seconds": round(whole, 4),
        "matmul_ceiling_gflops": round(ceiling / 1e9, 1),
        "seconds_of_matrix_products_at_the_ceiling": round(at_ceiling, 4),
        "share_of_time": {k: round(v / total, 4) for k, v in sorted(times.items(), key=lambda kv: -kv[1])},
        "largest_of_other": {name: round(spent[name] / total, 4) for name in others[:6]},
    }


def kernels(recorded: profile) -> dict[str, float]:
    """Return the time by name: of operators on a CPU, of kernels on a GPU (whose operators would count them twice)."""
    events = recorded.key_averages()
    if CUDA:
        return {e.key: e.self_device_time_total for e in events if e.device_type == DeviceType.CUDA}
    return {e.key: e.self_cpu_time_total for e in events}


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")


if __name__ == "__main__":
    main()
