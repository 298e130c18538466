"""Memorisation: is what a model draws nearer to the images it learned from than these are to each other?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..image_grid import make_grid
from .metrics import nearest

MAX_QUERIES = 10_000  # of real images, whose neighbours are looked for among all
CLOSEST = 16


@dataclass(frozen=True)
class Neighbours:
    """Nearest real images of samples, and of real images among the others.

    Attributes:
        distances: Of each sample to its nearest real image.
        rows: Which that is, by its place in the reference.
        real: Distances of real images to the nearest other one.
    """

    distances: np.ndarray
    rows: np.ndarray
    real: np.ndarray

    def figures(self) -> dict[str, float]:
        """Shares of samples that are nearer to a real image than real ones are to each other.

        Of new images as varied as the real ones 1 % are nearer than the closest 1 % of these, and half are nearer
        than half of these; a model that repeats its images has more.
        """
        return {
            "share_within_closest_1_percent": float(np.mean(self.distances < np.quantile(self.real, 0.01))),
            "share_within_closest_half": float(np.mean(self.distances < np.quantile(self.real, 0.5))),
            "median_distance": float(np.median(self.distances)),
            "median_distance_between_real": float(np.median(self.real)),
        }

    def closest(self) -> list[int]:
        """The samples nearest to a real image, nearest first."""
        return np.argsort(self.distances, kind="stable")[:CLOSEST].tolist()


def find_neighbours(samples: np.ndarray, reference: np.ndarray, seed: int = 0) -> Neighbours:
    """Nearest neighbours in feature space of samples [n, dim] among the reference's [count, dim]."""
    distances, rows = nearest(samples, reference)
    queries = np.random.default_rng(seed).permutation(len(reference))[:MAX_QUERIES]
    return Neighbours(distances, rows, nearest(reference[queries], reference, own=queries)[0])


def make_pairs_grid(drawn: np.ndarray, real: np.ndarray, distances: np.ndarray) -> Image.Image:
    """An image grid of samples, each beside its nearest real image."""
    images, captions = [], []
    for sample, picture, distance in zip(drawn, real, distances, strict=True):
        images += [Image.fromarray(sample), Image.fromarray(picture)]
        captions += [f"drawn, {distance:.1f} from", "the real one"]
    title = "drawn images and the nearest real ones, in feature space; the closest pairs first"
    return make_grid(images, 8, captions, title, min_side=96)


def describe_pairs(neighbours: Neighbours) -> list[dict[str, Any]]:
    """The closest pairs: number of the sample, place of the real image, distance."""
    return [
        {"sample": number, "real": int(neighbours.rows[number]), "distance": float(neighbours.distances[number])}
        for number in neighbours.closest()
    ]
