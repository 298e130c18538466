"""Distances between two sets of features (Fréchet, kernel, precision and recall) and their standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..devices import default_device

GROUPS = 20  # of the jackknife
NEIGHBOURS = 3  # of precision and recall, as in https://arxiv.org/abs/1904.06991
MANIFOLD_IMAGES = 50_000  # at most, a side: the time of precision and recall is quadratic in them
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # the defaults of torch-fidelity and torchmetrics


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution with the mean and covariance of a set of features, as the Fréchet distance needs it.

    Attributes:
        mean: float64 [dim].
        factor: float64 [dim, rank]; the covariance is `factor @ factor.T`. With few images the rank is below dim.
        count: Number of images.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Estimate it from features [count, dim], by the sample's mean and unbiased covariance.

        Raises:
            ValueError: for fewer than two images, or features that are not finite.
        """
        values = torch.from_numpy(np.asarray(features)).double()
        count, dim = values.shape
        if count < 2:
            raise ValueError(f"a covariance of {count} images: at least two are needed")
        if not torch.isfinite(values).all():
            raise ValueError("features are not finite")
        mean = values.mean(0)  # [dim]
        centred = (values - mean) / (count - 1) ** 0.5  # [count, dim]
        # With few images the centred features themselves are the smaller factor.
        if count <= dim:
            return cls(mean, centred.T, count)
        return cls.of_statistics(mean, centred.T @ centred, count)

    @classmethod
    def of_statistics(cls, mean: torch.Tensor, covariance: torch.Tensor, count: int) -> Gaussian:
        """Build it from a mean [dim] and a covariance [dim, dim], without eigenvalues that are zero up to rounding."""
        values, vectors = torch.linalg.eigh(covariance.double())  # [dim], [dim, dim]
        significant = values > values.max() * len(values) * torch.finfo(torch.float64).eps
        return cls(mean.double(), vectors[:, significant] * values[significant].sqrt(), count)


@dataclass(frozen=True)
class Manifold:
    """The union of balls around images, each reaching to the image's third nearest neighbour among them.

    Attributes:
        features: float32 [count, dim], on the accelerator if there is one.
        radii: Of the balls, float32 [count].
    """

    features: torch.Tensor
    radii: torch.Tensor

    @classmethod
    def of(cls, features: np.ndarray) -> Manifold:
        """Build it from features [count, dim]; of more than 50,000 so many are taken, evenly spread."""
        count = min(len(features), MANIFOLD_IMAGES)
        values = _on_device(features[np.arange(count) * len(features) // count])
        # Every image is at distance 0 of itself, hence the + 1. `kthvalue` takes ten times as long.
        nearest = [block.topk(NEIGHBOURS + 1, largest=False).values for _, block in _distance_blocks(values, values)]
        return cls(values, torch.cat(nearest)[:, -1])


def frechet_distance(first: Gaussian | np.ndarray, second: Gaussian | np.ndarray) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two normal distributions or two sets of features.

    It is |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½ (Dowson and Landau, 1982; https://arxiv.org/abs/1706.08500). With
    C = F Fᵀ the last trace is the sum of the singular values of F1ᵀ F2, which is exact for singular covariances too:
    those of fewer images than features.
    """
    one, other = (side if isinstance(side, Gaussian) else Gaussian.of(side) for side in (first, second))
    shared = torch.linalg.svdvals(one.factor.T @ other.factor).sum()
    spread = one.factor.square().sum() + other.factor.square().sum()
    return float((one.mean - other.mean).square().sum() + spread - 2 * shared)


def kernel_distance(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the KID (https://arxiv.org/abs/1801.01401): the unbiased squared MMD with the kernel (x·y / dim + 1)³.

    Returns:
        Mean over 100 random subsets of up to 1,000 images a side, and the standard deviation between them.
    """
    # Imported here, because training measures the Fréchet distance without torchmetrics. `poly_mmd` is not
    # documented (read in torchmetrics 1.9).
    from torchmetrics.image.kid import poly_mmd

    size = min(len(features), len(reference), KID_SUBSET_SIZE)
    values = []
    for subset in range(KID_SUBSETS):
        rng = np.random.default_rng([seed, subset])
        real, generated = (
            torch.from_numpy(side[rng.choice(len(side), size, replace=False)]).double()
            for side in (reference, features)
        )
        values.append(float(poly_mmd(real, generated)))
    return float(np.mean(values)), float(np.std(values))


def precision_and_recall(features: Manifold | np.ndarray, reference: Manifold | np.ndarray) -> tuple[float, float]:
    """Return improved precision and recall (https://arxiv.org/abs/1904.06991).

    Precision is the share of the images within the reference's manifold, recall the share of the reference within the
    images' manifold; see [`Manifold`] for sets of more than 50,000.
    """
    one, other = (side if isinstance(side, Manifold) else Manifold.of(side) for side in (features, reference))
    precise = 0
    recalled = torch.zeros(len(other.features), dtype=torch.bool, device=other.features.device)
    for start, block in _distance_blocks(one.features, other.features):
        precise += int((block <= other.radii).any(1).sum())
        recalled |= (block <= one.radii[start : start + len(block), None]).any(0)
    return precise / len(one.features), int(recalled.sum()) / len(recalled)


def nearest(
    features: np.ndarray, reference: np.ndarray, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance to the nearest row of `reference`, and that row, [len(features)] each.

    Args:
        features: [n, dim].
        reference: [count, dim].
        own: Rows of `features` in `reference` if they are part of it, [n]: an image is not its own neighbour.
    """
    found = []
    for start, block in _distance_blocks(_on_device(features), _on_device(reference)):
        if own is not None:
            ranks = torch.arange(len(block), device=block.device)
            block[ranks, torch.from_numpy(own[start : start + len(block)]).to(block.device)] = torch.inf
        found.append(block.argmin(1))
    rows = torch.cat(found).cpu().numpy()
    # Again, because products round: the distance of a copy is 0.
    parts = range(0, len(rows), 1000)
    differences = (features[i : i + 1000] - np.asarray(reference, np.float64)[rows[i : i + 1000]] for i in parts)
    return np.concatenate([np.linalg.norm(part, axis=1) for part in differences]), rows


def standard_error(metric: Callable[[np.ndarray], float], features: np.ndarray, seed: int = 0) -> float:
    """Estimate the standard error of `metric(features)` by the delete-group jackknife.

    Unlike the bootstrap, it repeats no image, which would make a sample look less varied than it is. The reference is
    held fixed: the error is the variation between sets of images of this size.
    """
    groups = np.array_split(np.random.default_rng(seed).permutation(len(features)), min(GROUPS, len(features)))
    values = np.array([metric(np.delete(features, group, 0)) for group in groups])
    return float(np.sqrt((len(groups) - 1) * np.mean(np.square(values - values.mean()))))


def extrapolated(metric: Callable[[np.ndarray], float], features: np.ndarray, seed: int = 0) -> float:
    """Extrapolate `metric` to infinitely many images, for a metric with a bias proportional to 1 / N.

    A Fréchet distance of N images is too high by about c / N (https://arxiv.org/abs/1911.07023). The line through its
    value at N and its mean over the two halves is followed to 1 / N = 0.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    halves = [metric(features[half]) for half in np.array_split(order, 2)]
    return float(2 * metric(features) - np.mean(halves))


def measure(
    features: np.ndarray, reference: np.ndarray, gaussian: Gaussian, manifold: Manifold, seed: int = 0
) -> dict[str, Any]:
    """Return all figures of features against a reference, its statistics and its manifold, with their errors."""

    def frechet(some: np.ndarray) -> float:
        return frechet_distance(some, gaussian)

    kid, kid_deviation = kernel_distance(features, reference, seed)
    precision, recall = precision_and_recall(features, manifold)
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


def _on_device(features: np.ndarray) -> torch.Tensor:
    """Return features as float32 on the accelerator, if there is one."""
    return torch.from_numpy(np.asarray(features, np.float32)).to(default_device())


def _distance_blocks(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield Euclidean distances of blocks of rows of `one` to all of `other`, [block, len(other)], with the first row.

    Blocks bound the memory: at most ten million distances at once.
    """
    step = max(1, 10_000_000 // len(other))
    # Distances are computed from products, whose rounding is least around the mean.
    mean = other.mean(0)
    one, other = one - mean, other - mean
    for start in range(0, len(one), step):
        yield start, torch.cdist(one[start : start + step], other, compute_mode="use_mm_for_euclid_dist")
