"""Check that the figures of `dit-hf evaluate` agree with what a person sees: avatars against distorted avatars.

The reference is N avatars of the embedded data set. Compared with it are the next N, and these blurred, with noise, in
grey, in few colours, and 50 of them repeated. The two disjoint halves must be nearest, and a stronger distortion must
be further away. The distance of the two halves is the floor of every model measured with the same N.

    python benchmarks/evaluation.py --json benchmarks/results/evaluation.json
"""

import argparse
import datetime
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from image_features import features_of
from machine import machine
from PIL import Image, ImageFilter, ImageOps

from dit_hf import open_images
from dit_hf.data.contents import SourceOptions
from dit_hf.data.transforms import Geometry
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import Gaussian, Manifold, measure
from dit_hf.evaluation.reference_images import open_reference_images, reconstruction_reader
from dit_hf.latents.vae import load_vae

RESOLUTION = 64


def noise(deviation: float) -> Callable[[Image.Image], Image.Image]:
    rng = np.random.default_rng(0)

    def distort(image: Image.Image) -> Image.Image:
        values = np.asarray(image) + rng.normal(0, deviation, (RESOLUTION, RESOLUTION, 3))
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))

    return distort


# In each line one distortion, stronger from left to right.
DISTORTIONS: list[dict[str, Callable[[Image.Image], Image.Image]]] = [
    {f"blur of {radius:g} px": lambda p, r=radius: p.filter(ImageFilter.GaussianBlur(r)) for radius in (0.5, 1, 2)},
    {f"noise of sd {deviation}": noise(deviation) for deviation in (4, 12, 36)},
    {f"{2**bits} levels a colour": lambda p, b=bits: ImageOps.posterize(p, b) for bits in (4, 3, 2)},
    {"greyscale": lambda p: ImageOps.grayscale(p).convert("RGB")},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=600)
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    count, net = options.num_samples, load_features(options.features)
    images = open_images("avatars", RESOLUTION, num_images=2 * count)["image"]
    reference = features_of(net, [images[i] for i in range(count)])
    others = [images[i] for i in range(count, 2 * count)]
    rows = {"other avatars (the floor)": figures(features_of(net, others), reference)}
    reference_images = open_reference_images(
        "avatars", Geometry((RESOLUTION, RESOLUTION)), SourceOptions(num_images=2 * count)
    )
    rebuild = reconstruction_reader(reference_images, load_vae("avatar"))
    rebuilt = [net(rebuild(range(start, min(start + 50, 2 * count)))) for start in range(count, 2 * count, 50)]
    rows["the bundled VAE's reconstructions"] = figures(np.concatenate(rebuilt), reference)
    for distortion in DISTORTIONS:
        rows |= {
            name: figures(features_of(net, map(distort, others)), reference) for name, distort in distortion.items()
        }
    few = features_of(net, others[:50])
    rows["50 avatars repeated"] = figures(few[np.arange(count) % 50], reference)
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "num_samples": count,
        "num_reference": count,
        "resolution": RESOLUTION,
        "features": net.identity(),
        "grows_with_every_fault": all(
            distance(rows, less) < distance(rows, more)
            for distortion in DISTORTIONS
            for less, more in pairwise(distortion)
        ),
        "floor_is_lowest": min(rows, key=lambda name: distance(rows, name)) == "other avatars (the floor)",
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def distance(rows: dict[str, dict[str, float]], name: str) -> float:
    return rows[name]["frechet_distance"]


def figures(some: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    measured = measure(some, reference, Gaussian.of(reference), Manifold.of(reference))
    names = ("frechet_distance", "standard_error", "kid", "precision", "recall")
    return {name: float(f"{measured[name]:.5g}") for name in names}


if __name__ == "__main__":
    main()
