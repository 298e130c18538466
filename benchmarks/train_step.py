"""One training step against other systems', alternating in one process: forward, loss, backward, optimizer, EMA.

python benchmarks/train_step.py [--peers DIR] [--size reference] [--batch 4] [--rounds 8] [--json FILE]

--peers DIR holds checkouts of github.com/facebookresearch/DiT and, optionally, github.com/chuanyangjin/fast-DiT as
`DiT` and `fast-DiT`. Ours is the step that the trainer takes (reader, objective, loss scale, optimizer, EMA), by the
recipes celeba-l1.yaml (`dit_hf`) and celeba.yaml (`dit_hf, celeba recipe`). On a GPU DiT is timed compiled, too.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from machine import machine
from peers import diffusers_dit, facebookresearch_dit

from dit_hf.config import PRESETS
from dit_hf.latents.prepare import prepare_latents
from dit_hf.recipe_file import read_config
from dit_hf.training.throughput import flops_per_image, peak_flops
from dit_hf.training.trainer import Trainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--size", default="reference", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=200 if CUDA else 4)
    parser.add_argument("--latent", type=int, default=32, help="Side of the latents.")
    parser.add_argument("--precision", default="fp16" if CUDA else "no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10 if CUDA else 1, help="Steps of each in a round.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for result in compare(contestants(options, Path(scratch)), options):
            if options.json:  # after every round: what is cut short leaves something
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def contestants(options: argparse.Namespace, scratch: Path) -> dict[str, Callable[[int], Any]]:
    """Build the steps to compare, by name."""
    sizes = (options.batch, 4, options.latent, options.latent)
    preset, place = PRESETS[options.size], {"device": DEVICE, "precision": options.precision}
    folder = prepare(scratch / "latents", options.latent)
    steps: dict[str, Callable[[int], Any]] = {}
    for recipe, name in (("celeba-l1", "dit_hf"), ("celeba", "dit_hf, celeba recipe")):
        steps[name] = ours(options, folder, recipe, compiled=False)
        steps[f"{name}, compiled"] = ours(options, folder, recipe, compiled=True)
    if CUDA and importlib.util.find_spec("apex") is not None:
        steps["dit_hf, compiled, apex"] = ours(
            options, folder, "celeba-l1", compiled=True, optimizer="apex_fused_adam"
        )
    steps["diffusers DiTTransformer2DModel"] = diffusers_dit(preset, sizes, **place)
    for name, folder_name in (("facebookresearch/DiT", "DiT"), ("fast-DiT", "fast-DiT")):
        checkout = options.peers / folder_name if options.peers else None
        if checkout and checkout.is_dir():
            steps[name] = facebookresearch_dit(checkout, preset, sizes, **place)
            if CUDA:
                steps[f"{name}, compiled"] = compiled = facebookresearch_dit(checkout, preset, sizes, **place)
                compiled.model.compile()
    return steps


def prepare(folder: Path, side: int) -> str:
    """Build a cache of a few latents [4, side, side] and return its folder."""
    prepare_latents(
        source="avatars", vae="avatar", resolution=str(4 * side), num_images=64, flip=True, output_dir=str(folder)
    )
    return str(folder)


def ours(
    options: argparse.Namespace, folder: str, recipe: str, compiled: bool, optimizer: str | None = None
) -> Callable[[int], Any]:
    """Build the trainer's step for a recipe."""
    config = read_config(Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml")
    config.data.latents, config.model.preset = folder, options.size
    config.optim.optimizer = optimizer or config.optim.optimizer.replace("apex_fused_adam", "adamw")
    train = config.train
    train.global_batch_size, train.mixed_precision, train.torch_compile = options.batch, options.precision, compiled
    train.validation_images, train.report_to = 0, "none"
    return Trainer(config).step


def compare(steps: dict[str, Callable[[int], Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time the contestants in turn, and the machine's ceiling in every round; yield the result so far after each."""
    first = {}
    for name, step in steps.items():
        first[name] = seconds(lambda: step(0))  # noqa: B023
        print(f"{name}: first step {first[name]:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int | None] = {}
    ceilings = []
    for round_ in range(options.rounds):
        ceilings.append(matmul_flops(options))
        for name, step in steps.items():
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            first_step = 1 + round_ * options.steps
            block = seconds(lambda: [step(first_step + i) for i in range(options.steps)])  # noqa: B023
            times[name].append(block / options.steps)
            # The memory of a step, without what the other contestants hold.
            peaks[name] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() if CUDA else None
        yield summary(steps, options, first, times, peaks, max(ceilings))


def summary(
    steps: dict[str, Callable[[int], Any]],
    options: argparse.Namespace,
    first: dict[str, float],
    times: dict[str, list[float]],
    peaks: dict[str, int | None],
    ceiling: float,
) -> dict[str, Any]:
    """Return the result for the JSON file, from seconds by contestant and round."""
    config = steps["dit_hf"].transformer.config
    flops = flops_per_image(config) * options.batch
    peak = peak_flops(torch.cuda.get_device_name()) if CUDA else None
    rows = {}
    for name, values in times.items():
        median = statistics.median(values)
        rows[name] = {
            "seconds": round(median, 4),
            "images_per_second": round(options.batch / median, 2),
            "share_of_matmul_ceiling": round(flops / median / ceiling, 3),
            "mfu": round(flops / median / peak, 3) if peak else None,
            "first_step_seconds": round(first[name], 1),
            "optimizer": getattr(steps[name], "optimizer_name", "torch AdamW"),
            "loss": window_loss(steps[name]),
            "peak_gb_beside_weights_and_moments": peak_gb(peaks[name]),
            "parameters": sum(p.numel() for p in steps[name].model.parameters()),
        }
    against = {
        peer: {
            name: round(statistics.median(b / a for a, b in zip(values, times[peer], strict=True)), 3)
            for name, values in times.items()
            if name.startswith("dit_hf")
        }
        for peer in times
        if not peer.startswith("dit_hf")
    }
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **{name: getattr(options, name) for name in ("size", "batch", "latent", "precision")},
        "rounds": len(next(iter(times.values()))),
        "gflop_a_step": round(flops / 1e9, 1),
        "matmul_ceiling_gflops": round(ceiling / 1e9, 1),
        "steps": rows,
        "times_as_fast_as": against,
    }


def window_loss(step: Any) -> float | None:
    """Return the mean loss of all steps of ours, which get the same images and noise; None for a peer."""
    if not hasattr(step, "window"):
        return None
    total, count = step.window.sum(1).tolist()
    return round(total / count, 6)


def peak_gb(size: int | None) -> float | None:
    return None if size is None else round(size / 1e9, 2)


def matmul_flops(options: argparse.Namespace) -> float:
    """Return the best of three timings of products [batch * tokens, 768] x [768, 3072], in FLOP/s."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.precision]
    rows = options.batch * (options.latent // 2) ** 2
    a, b = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((rows, 768), (768, 3072)))
    repeat = 20
    best = min(seconds(lambda: [a @ b for _ in range(repeat)]) for _ in range(3))
    return repeat * 2 * rows * 768 * 3072 / best


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
