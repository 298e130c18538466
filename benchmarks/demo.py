"""How good the demo's faces are: their Fréchet distance to avatars, over that between avatars and other avatars.

python benchmarks/demo.py MODEL [--num_inference_steps 12 25] [--eta 0 1] [--vae avatar]   (MODEL is the demo's run)

200 images are generated for the attributes of 200 avatars and compared with these avatars, which are compared with 200
others: three times, with avatars and noise of three seeds. So 1 would be as good as avatars are. A classifier counts
how often attributes that are requested, or are not, are recognized.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from avatar_classifier import avatars, classify, train_classifier
from image_features import features_of
from machine import machine
from manipulation import rows_of
from torch import nn

from dit_hf import LatentDiTPipeline
from dit_hf.data.avatars import ATTRIBUTES
from dit_hf.demo import SAMPLING
from dit_hf.evaluation.features import FeatureNet, load_features
from dit_hf.evaluation.metrics import frechet_distance
from dit_hf.latents.vae import load_vae
from dit_hf.runs import load_pipeline, read_log
from dit_hf.sampling.generate import batches, generate_images, model_sha256

SEEDS, COUNT = (101, 102, 103), 200  # of the avatars and of the noise
RESULTS = Path(__file__).parent / "results" / "demo.json"
VISIBLE = ("Eyeglasses", "Wearing_Hat", "Smiling", "Bald", "Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--guidance_scale", nargs="+", type=float, default=[None], help="Default: the pipeline's.")
    parser.add_argument("--num_inference_steps", nargs="+", type=int, default=[SAMPLING["num_inference_steps"]])
    parser.add_argument("--eta", nargs="+", type=float, default=[SAMPLING["eta"]])
    parser.add_argument("--vae", nargs="+", default=[None], help="VAEs with the latents of MODEL's. Default: MODEL's.")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    pipeline, net, classifier = load_pipeline(options.model), load_features("efficientnet-lite0"), train_classifier()
    log = read_log(Path(options.model))
    result: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "model_sha256": model_sha256(pipeline),
        "steps_of_training": int(log[-1]["step"]) if log else None,
        "seeds": SEEDS,
        "images": COUNT,
        "settings": [],
    }
    own_vae = pipeline.vae
    choices = (options.vae, options.guidance_scale, options.num_inference_steps, options.eta)
    for vae, scale, steps, eta in itertools.product(*choices):
        pipeline.vae = own_vae if vae is None else load_vae(vae, own_vae.device)
        sampling = {
            "guidance_scale": pipeline.config.guidance_scale if scale is None else scale,
            "num_inference_steps": steps,
            "eta": eta,
        }
        measured = measure(pipeline, net, classifier, sampling)
        result["settings"].append({"vae": vae or "the model's own", **sampling, **measured})
        print(json.dumps(result["settings"][-1]), flush=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(
    pipeline: LatentDiTPipeline, net: FeatureNet, classifier: nn.Module, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Return the mean ratio of distances, and how often requested attributes are recognized."""
    ratios, predicted, requested = [], [], []
    for seed in SEEDS:
        images, labels = avatars(seed, 2 * COUNT)
        rows = rows_of(labels[:COUNT])
        generated = np.concatenate(
            [generate_images(pipeline, part, rows, seed, **sampling) for part in batches(COUNT, 50)]
        )
        real, others, samples = (features_of(net, part) for part in (images[:COUNT], images[COUNT:], generated))
        ratios.append(frechet_distance(samples, real) / frechet_distance(others, real))
        predicted.append(classify(classifier, generated))
        requested.append(labels[:COUNT])
    shown, wanted = np.concatenate(predicted), np.concatenate(requested)
    columns = {name: ATTRIBUTES.index(name) for name in VISIBLE}
    return {
        "times_avatars": round(float(np.mean(ratios)), 2),
        "by_seed": [round(float(ratio), 2) for ratio in ratios],
        "shown_when_requested": {n: round(float(shown[wanted[:, i] == 1, i].mean()), 3) for n, i in columns.items()},
        "shown_when_not_requested": {
            n: round(float(shown[wanted[:, i] == 0, i].mean()), 3) for n, i in columns.items()
        },
    }


if __name__ == "__main__":
    main()
