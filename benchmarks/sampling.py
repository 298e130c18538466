"""Images a second of our pipeline against diffusers' DiTPipeline: same size, steps, guidance and VAE, alternating.

python benchmarks/sampling.py [--size reference] [--batch 4] [--inference_steps 10] [--rounds 5] [--json FILE]

The weights are random, which takes the same time. Each uses its own scheduler (ours, and diffusers' DDIMScheduler) and
generates a class with guidance, which doubles the batch. The VAE has Stable Diffusion's architecture.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from machine import machine
from torch import nn
from vaes import sd_shaped_vae

from dit_hf import CosineLatentScheduler, LatentDiTPipeline, LatentDiTTransformer2DModel
from dit_hf.config import PRESETS

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="reference", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=64 if CUDA else 4)
    parser.add_argument("--inference_steps", type=int, default=10)
    parser.add_argument("--precision", default="fp16" if CUDA else "no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = compare(options)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    calls = contestants(options)
    first = {name: seconds(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    rows = {}
    for name, values in times.items():
        peer = "diffusers" + (", without the VAE" if name.endswith("without the VAE") else "")
        rows[name] = {
            "images_per_second": round(options.batch / statistics.median(values), 3),
            "times_as_fast_as_diffusers": round(
                statistics.median(b / a for a, b in zip(values, times[peer], strict=True)), 3
            ),
            "first_call_seconds": round(first[name], 1),
        }
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **{name: getattr(options, name) for name in ("size", "batch", "inference_steps", "precision", "rounds")},
        "pipelines": rows,
    }


def contestants(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return calls that generate `batch` images, by name."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.precision]
    vae = sd_shaped_vae()
    options_of_call = {"guidance_scale": 2.0, "num_inference_steps": options.inference_steps}
    calls: dict[str, Callable[[], Any]] = {}
    for name, compiled in (("dit_hf", False), ("dit_hf, compiled", True)):
        transformer = LatentDiTTransformer2DModel(conditions={"class": 1000}, **PRESETS[options.size])
        pipeline = LatentDiTPipeline(transformer.eval(), CosineLatentScheduler(), vae)
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True)
        call = prepared(pipeline, dtype, [{"class": 1}] * options.batch, output_type="np", **options_of_call)
        calls[name] = call
        calls[f"{name}, without the VAE"] = lambda call=call: call(output_type="latent")
    for name, decoder in (("diffusers", vae), ("diffusers, without the VAE", NoVAE())):
        theirs = DiTTransformer2DModel(
            sample_size=32, in_channels=4, out_channels=4, num_embeds_ada_norm=1000, **PRESETS[options.size]
        )
        pipeline = DiTPipeline(theirs.eval(), decoder, DDIMScheduler())
        calls[name] = prepared(pipeline, dtype, [1] * options.batch, output_type="np", **options_of_call)
    return calls


class NoVAE(nn.Module):
    """A VAE that decodes to a black image in no time."""

    config = AutoencoderKL().config
    device, dtype = torch.device(DEVICE), torch.float32

    def decode(self, latents: torch.Tensor) -> Any:
        return type("Decoded", (), {"sample": torch.zeros(len(latents), 3, 8, 8)})


def prepared(pipeline: Any, dtype: torch.dtype, *args: Any, **defaults: Any) -> Callable[..., Any]:
    pipeline.to(DEVICE, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return lambda **options: pipeline(*args, **{**defaults, **options})


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
