"""Memorization: compare the distance of samples to the training images with the distances between these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..image_grid import make_grid
from .metrics import nearest

MAX_QUERIES = 10_000  # real images whose nearest neighbour is searched
CLOSEST = 16


@dataclass(frozen=True)
class Neighbours:
    """Distances of samples to their nearest real images, and of real images to each other.

    Attributes:
        distances: Distance of each sample to its nearest real image, [samples].
        rows: Row of that image in the reference, [samples].
        real: Distance of real images to the nearest other one, [queries].
    """

    distances: np.ndarray
    rows: np.ndarray
    real: np.ndarray

    def figures(self) -> dict[str, float]:
        """Return the shares of samples that are nearer to a real image than real images are to each other.

        If the samples are new and as varied as the real images, 1 % of them are nearer than the 1 % quantile of the
        distances between real images, and half of them are nearer than the median. A model that repeats its training
        images exceeds both.
        """
        return {
            "share_within_closest_1_percent": float(np.mean(self.distances < np.quantile(self.real, 0.01))),
            "share_within_closest_half": float(np.mean(self.distances < np.quantile(self.real, 0.5))),
            "median_distance": float(np.median(self.distances)),
            "median_distance_between_real": float(np.median(self.real)),
        }

    def closest(self) -> list[int]:
        """Return the numbers of the samples nearest to a real image, nearest first."""
        return np.argsort(self.distances, kind="stable")[:CLOSEST].tolist()


def find_neighbours(samples: np.ndarray, reference: np.ndarray, seed: int = 0) -> Neighbours:
    """Find the nearest neighbours in feature space of samples [n, dim] in a reference [count, dim]."""
    distances, rows = nearest(samples, reference)
    queries = np.random.default_rng(seed).permutation(len(reference))[:MAX_QUERIES]
    return Neighbours(distances, rows, nearest(reference[queries], reference, own=queries)[0])


def make_pairs_grid(samples: np.ndarray, real: np.ndarray, distances: np.ndarray) -> Image.Image:
    """Make an image grid of samples, each beside its nearest real image.

    Args:
        samples: uint8 [n, height, width, 3].
        real: The nearest real images, uint8 [n, height, width, 3].
        distances: Distance of each pair, [n].
    """
    images, captions = [], []
    for sample, neighbour, distance in zip(samples, real, distances, strict=True):
        images += [Image.fromarray(sample), Image.fromarray(neighbour)]
        captions += [f"sample, {distance:.1f} from", "real image"]
    title = "samples and their nearest real images in feature space, closest pairs first"
    return make_grid(images, 8, captions, title, min_side=96)


def describe_pairs(neighbours: Neighbours) -> list[dict[str, Any]]:
    """Return the closest pairs: number of the sample, row of the real image, distance."""
    return [
        {"sample": number, "real": int(neighbours.rows[number]), "distance": float(neighbours.distances[number])}
        for number in neighbours.closest()
    ]
