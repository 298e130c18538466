"""Distances between two sets of features: Fréchet, kernel, precision and recall, and how sure of them one can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

GROUPS = 20  # of the jackknife
NEIGHBOURS = 3  # of precision and recall, as in their paper
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as is usual


@dataclass(frozen=True)
class Gaussian:
    """What a set of features is to the Fréchet distance: the normal distribution of its mean and covariance.

    Attributes:
        mean: float64 [dim].
        factor: float64 [dim, rank], the covariance is `factor @ factor.T`. Rank is below dim with few images.
        count: How many images.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Of features [count, dim]: the sample's mean and unbiased covariance.

        Raises:
            ValueError: for less than two images, or features that are not finite.
        """
        values = torch.from_numpy(np.asarray(features)).double()
        count, dim = values.shape
        if count < 2:
            raise ValueError(f"a covariance of {count} images: at least two are needed")
        if not torch.isfinite(values).all():
            raise ValueError("features are not finite")
        mean = values.mean(0)
        centred = (values - mean) / (count - 1) ** 0.5
        if count <= dim:
            return cls(mean, centred.T, count)
        return cls.of_statistics(mean, centred.T @ centred, count)

    @classmethod
    def of_statistics(cls, mean: torch.Tensor, covariance: torch.Tensor, count: int) -> Gaussian:
        """Of a mean [dim] and a covariance [dim, dim]; what is zero but for rounding is left out of it."""
        values, vectors = torch.linalg.eigh(covariance.double())
        kept = values > values.max() * len(values) * torch.finfo(torch.float64).eps
        return cls(mean.double(), vectors[:, kept] * values[kept].sqrt(), count)


def frechet_distance(first: Gaussian | np.ndarray, second: Gaussian | np.ndarray) -> float:
    """Fréchet (2-Wasserstein) distance, squared, of two normal distributions, or of those of two sets of features.

    |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½ (Dowson and Landau, 1982; https://arxiv.org/abs/1706.08500), where the
    last trace is the sum of the singular values of F1ᵀ F2 for C = F Fᵀ: exact also where covariances are singular,
    as they are with fewer images than features.
    """
    one, other = (side if isinstance(side, Gaussian) else Gaussian.of(side) for side in (first, second))
    shared = torch.linalg.svdvals(one.factor.T @ other.factor).sum()
    spread = one.factor.square().sum() + other.factor.square().sum()
    return float((one.mean - other.mean).square().sum() + spread - 2 * shared)


def kernel_distance(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """KID (https://arxiv.org/abs/1801.01401): the unbiased squared MMD with the kernel (x·y / dim + 1)³.

    Returns:
        Mean over 100 random subsets of up to 1,000 images a side, and the standard deviation between them.
    """
    from torchmetrics.image.kid import poly_mmd  # here, for training does not need it

    size = min(len(features), len(reference), KID_SUBSET_SIZE)
    values = []
    for subset in range(KID_SUBSETS):
        rng = np.random.default_rng([seed, subset])
        real, drawn = (
            torch.from_numpy(side[rng.choice(len(side), size, replace=False)]).double()
            for side in (reference, features)
        )
        values.append(float(poly_mmd(real, drawn)))
    return float(np.mean(values)), float(np.std(values))


def precision_and_recall(
    features: np.ndarray, reference: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (https://arxiv.org/abs/1904.06991).

    Precision is the share of images within the reference's manifold, which is the balls around its images that
    reach to the third nearest other one; recall the share of the reference within that of the images.
    """
    one, other = (torch.from_numpy(np.asarray(side)).double() for side in (features, reference))
    return _share_within(one, other, neighbours), _share_within(other, one, neighbours)


def nearest(
    features: np.ndarray, reference: np.ndarray, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest of `reference` and its row, [len(features)] each.

    Where the features are among the reference's, `own` says in which rows: an image is not its own neighbour.
    """
    one, other = (torch.from_numpy(np.asarray(side)).double() for side in (features, reference))
    distances, rows = [], []
    for start, block in _distance_blocks(one, other):
        if own is not None:
            block[torch.arange(len(block)), torch.from_numpy(own[start : start + len(block)])] = torch.inf
        smallest = block.min(1)
        distances.append(smallest.values)
        rows.append(smallest.indices)
    return torch.cat(distances).numpy(), torch.cat(rows).numpy()


def standard_error(metric: Callable[[np.ndarray], float], features: np.ndarray, seed: int = 0) -> float:
    """Standard error of `metric(features)` over draws of the images, by the jackknife with groups left out.

    Unlike the bootstrap it repeats no image, which would make a sample look less varied than it is. The reference is
    held fixed: what is told is how the figure varies from one set of images of this size to another.
    """
    groups = np.array_split(np.random.default_rng(seed).permutation(len(features)), min(GROUPS, len(features)))
    values = np.array([metric(np.delete(features, group, 0)) for group in groups])
    return float(np.sqrt((len(groups) - 1) * np.mean(np.square(values - values.mean()))))


def extrapolated(metric: Callable[[np.ndarray], float], features: np.ndarray, seed: int = 0) -> float:
    """`metric` as it would be with infinitely many images: its bias is proportional to 1 / N.

    A Fréchet distance of N images is too high by about c / N (https://arxiv.org/abs/1911.07023). The line through
    its values at N and, on average, at the two halves, is followed to 1 / N = 0.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    halves = [metric(features[half]) for half in np.array_split(order, 2)]
    return float(2 * metric(features) - np.mean(halves))


def measure(features: np.ndarray, reference: np.ndarray, gaussian: Gaussian, seed: int = 0) -> dict[str, Any]:
    """All figures of a set of features beside a reference's (and its statistics, `gaussian`), with their errors."""

    def frechet(some: np.ndarray) -> float:
        return frechet_distance(some, gaussian)

    kid, kid_deviation = kernel_distance(features, reference, seed)
    precision, recall = precision_and_recall(features, reference)
    value, error = frechet(features), standard_error(frechet, features, seed)
    return {
        "num_samples": len(features),
        "num_reference": len(reference),
        "frechet_distance": value,
        "standard_error": error,
        "interval_95": [value - 1.96 * error, value + 1.96 * error],
        "extrapolated": extrapolated(frechet, features, seed),
        "kid": kid,
        "kid_deviation": kid_deviation,
        "precision": precision,
        "recall": recall,
    }


def _share_within(points: torch.Tensor, centres: torch.Tensor, neighbours: int) -> float:
    """The share of `points` that lie within any of the balls around `centres`."""
    radii = torch.cat([block.kthvalue(neighbours + 1).values for _, block in _distance_blocks(centres, centres)])
    within = [(block <= radii).any(1) for _, block in _distance_blocks(points, centres)]
    return float(torch.cat(within).double().mean())


def _distance_blocks(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and Euclidean distances of some rows of `one` to all of `other`, block by block."""
    step = max(1, 10_000_000 // len(other))
    for start in range(0, len(one), step):
        yield start, torch.cdist(one[start : start + step], other, compute_mode="use_mm_for_euclid_dist")
