"""Quality against steps: Fréchet distance to avatars of another seed, for our scheduler and for stock ones.

python benchmarks/few_steps.py MODEL [--num_images 500] [--work DIR] [--json FILE] [--plot FILE]
python benchmarks/few_steps.py MODEL --num_images 2000 \\
    --samplers 'DPM-Solver++ 2M (default)' --steps 20 250                                (an hour on 2 cores)

MODEL was trained on avatars at 64 px. All samplers start from the same noise and get the attributes of the avatars
that they are compared with. Features are kept in DIR, so that a killed call is resumed; several calls, or
`torchrun --nproc_per_node 2`, share the work.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from avatar_classifier import avatars
from machine import machine
from manipulation import UNSEEN, rows_of
from matplotlib.figure import Figure

from dit_hf import CosineLatentScheduler
from dit_hf.evaluation.extract import Extraction, ranks
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import frechet_distance
from dit_hf.runs import load_pipeline
from dit_hf.sampling.generate import generate_images, model_sha256
from dit_hf.sampling.sample import SCHEDULERS
from dit_hf.schedulers.accuracy import check_num_inference_steps

SAMPLERS = {
    "DDIM": (CosineLatentScheduler, {"multistep": False}),
    "DPM-Solver++ 2M (default)": (CosineLatentScheduler, {}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, SCHEDULERS["HeunDiscreteScheduler"]),
}
BATCH, MANY = 50, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50, 250])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--work", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/few_steps.json"))
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/results/few_steps.png"))
    options = parser.parse_args()
    images, labels = avatars(UNSEEN, options.num_images)
    net, rows = load_features("efficientnet-lite0"), rows_of(labels)
    work = options.work / f"{Path(options.model).name}-{options.num_images}-{options.dtype}"

    def read_real(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return images[numbers], np.asarray(numbers)

    count = range(options.num_images)
    real = Extraction(work / "real", net, read_real, count, BATCH, {"seed": UNSEEN}, "real")
    real.extract()
    reference = real.join().features
    table = []
    for sampler in options.samplers:
        for steps in options.steps:
            if steps > MANY and SAMPLERS[sampler][0] is not CosineLatentScheduler:
                continue  # with many steps all samplers give the same images
            pipeline = pipeline_with(options, sampler)
            try:
                check_num_inference_steps(pipeline.scheduler, steps)
            except ValueError as error:  # Heun in 5 steps
                print(error, flush=True)
                continue
            entry = {"sampler": sampler, "steps": steps}
            identity = {**entry, "model_sha256": model_sha256(pipeline)}

            def generate(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
                return generate_images(pipeline, numbers, rows, 0, num_inference_steps=steps), np.asarray(numbers)  # noqa: B023

            folder = work / f"{sampler}-{steps}".replace(" ", "-")
            title = f"{sampler}, {steps} steps"
            samples = Extraction(folder, net, generate, count, BATCH, identity, title)
            samples.extract()
            features = samples.join().features
            # Heun evaluates the model twice a step, but once in the last.
            evaluations = 2 * steps - 1 if sampler == "Heun" else steps
            distance = round(frechet_distance(features, reference), 1)
            table.append({**entry, "evaluations": evaluations, "frechet_distance": distance})
            print(table[-1], flush=True)
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "model": Path(options.model).name,
        "features": net.label,
        "num_images": options.num_images,
        "dtype": options.dtype,
        "guidance_scale": pipeline_with(options, "DDIM").config.guidance_scale,
        "reference": f"avatars 0 to {options.num_images - 1} of seed {UNSEEN}",
        "table": table,
    }
    if ranks().is_main_process:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
        plot(result, options.plot)


def pipeline_with(options: argparse.Namespace, sampler: str) -> Any:
    pipeline = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    scheduler, settings = SAMPLERS[sampler]
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
    return pipeline


def plot(result: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for sampler in dict.fromkeys(entry["sampler"] for entry in result["table"]):
        entries = [entry for entry in result["table"] if entry["sampler"] == sampler]
        axes.plot([e["evaluations"] for e in entries], [e["frechet_distance"] for e in entries], "o-", label=sampler)
    ticks = sorted({entry["steps"] for entry in result["table"]})
    axes.set(xscale="log", xlabel="evaluations of the model", ylabel=result["features"])
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title(f"Quality against steps ({result['num_images']} images, guidance {result['guidance_scale']:g})")
    axes.grid(visible=True, alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
