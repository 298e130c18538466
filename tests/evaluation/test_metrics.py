"""Each figure against its definition, implemented independently, and against known answers."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from dit_hf.evaluation.metrics import (
    Gaussian,
    Manifold,
    extrapolated,
    frechet_distance,
    kernel_distance,
    measure,
    nearest,
    precision_and_recall,
    standard_error,
)


def sample(count, dim, seed, scale=1.0, shift=0.0):
    """Return correlated features whose spread decreases from axis to axis."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) * np.geomspace(1, 0.1, dim)
    return rng.normal(size=(count, dim)) @ mixing * scale + shift


def by_scipy(first, second):
    """Return the distance by the formula of pytorch-fid."""
    means = [side.mean(0) for side in (first, second)]
    covariances = [np.atleast_2d(np.cov(side, rowvar=False)) for side in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_frechet_distance_is_scipys(dim):
    first, second = sample(500, dim, 0), sample(400, dim, 1, 1.2, 0.3)
    assert frechet_distance(first, second) == pytest.approx(by_scipy(first, second), rel=1e-6)


def test_frechet_distance_of_known_normal_distributions_has_a_closed_form():
    """For covariances with common axes it is the distance of the means and of the roots of the eigenvalues."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(512, 64)))[0]
    ones, others, shift = rng.uniform(0.1, 2, 64), rng.uniform(0.1, 2, 64), rng.normal(size=512)
    sides = [
        Gaussian.of_statistics(torch.tensor(mean), torch.tensor((axes * values) @ axes.T), 10)
        for mean, values in ((np.zeros(512), ones), (shift, others))
    ]
    assert sides[0].factor.shape == (512, 64)  # the covariance is singular
    expected = np.square(shift).sum() + np.square(np.sqrt(ones) - np.sqrt(others)).sum()
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("few", "many"), [(20, 30), (20, 300), (300, 20)])
def test_frechet_distance_with_fewer_samples_than_dimensions(few, many):
    """The reference is numpy's eigenvalues of a product whose size is the smaller number of samples."""
    first, second = sample(few, 64, 0), sample(many, 64, 1, 1.2, 0.3)
    one, other = (side - side.mean(0) for side in (first, second))
    between = (one @ other.T) / np.sqrt((few - 1) * (many - 1))
    product = between @ between.T if few < many else between.T @ between
    root = np.sqrt(np.linalg.eigvalsh(product).clip(0)).sum()
    spread = np.square(one).sum() / (few - 1) + np.square(other).sum() / (many - 1)
    expected = np.square(first.mean(0) - second.mean(0)).sum() + spread - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


class IdentityNet(nn.Module):
    """The identity as a feature network for torchmetrics."""

    num_features = 16

    def forward(self, features):
        return features


def test_frechet_distance_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    first, second = sample(200, 16, 0), sample(300, 16, 1, 0.8)
    metric = FrechetInceptionDistance(feature=IdentityNet()).set_dtype(torch.float64)
    metric.update(torch.tensor(first), real=True)
    metric.update(torch.tensor(second), real=False)
    assert frechet_distance(first, second) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_kernel_distance_is_its_definition():
    first, second = sample(30, 4, 0), sample(30, 4, 1, shift=1.0)

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    within = [np.mean([kernel(side[i], side[j]) for i, j in pairs]) for side in (first, second)]
    between = np.mean([kernel(x, y) for x in first for y in second])
    value, deviation = kernel_distance(first, second)
    assert value == pytest.approx(within[0] + within[1] - 2 * between, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9)  # every subset is the whole


def test_kernel_distance_of_more_images_than_a_subset_is_deterministic_and_unbiased():
    first, second = sample(1500, 4, 0), sample(1200, 4, 1)
    value, deviation = kernel_distance(first, second, seed=3)
    assert (value, deviation) == kernel_distance(first, second, seed=3)
    assert deviation > 0
    assert abs(value) < 3 * deviation


def test_precision_and_recall_match_a_brute_force_version():
    features, reference = sample(60, 3, 0, 0.7), sample(80, 3, 1)

    def share(points, centres):
        inside = 0
        for point in points:
            for centre in centres:
                radius = sorted(np.linalg.norm(centres - centre, axis=1))[3]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    precision, recall = precision_and_recall(features, reference)
    assert (precision, recall) == pytest.approx((share(features, reference), share(reference, features)))
    assert precision > recall  # a narrower set covers less than it is covered by


def test_precision_and_recall_of_very_many_images_take_an_evenly_spread_part(monkeypatch):
    monkeypatch.setattr("dit_hf.evaluation.metrics.MANIFOLD_IMAGES", 50)
    features, reference = sample(101, 3, 0, 0.7), sample(200, 3, 1)
    spread = [number * 101 // 50 for number in range(50)]
    assert precision_and_recall(features, reference) == precision_and_recall(features[spread], reference[::4])


def test_precision_of_images_far_from_zero_is_that_of_the_same_images_around_it():
    """Their squares would take all digits of float32."""
    features, reference = sample(300, 8, 0), sample(300, 8, 1)
    assert precision_and_recall(features + 3000, reference + 3000) == precision_and_recall(features, reference)


def test_precision_falls_with_wrong_images_and_recall_with_missing_ones():
    reference = sample(300, 3, 0)
    wrong = np.concatenate([sample(150, 3, 1), sample(150, 3, 2) + 50])
    missing = np.repeat(sample(3, 3, 3), 100, 0) + 1e-3 * sample(300, 3, 4)
    assert precision_and_recall(wrong, reference)[0] < 0.55
    assert precision_and_recall(missing, reference)[1] < 0.1


def test_nearest_matches_numpy_and_an_image_is_not_its_own_neighbour():
    features, reference = sample(20, 5, 0), sample(30, 5, 1)
    table = np.linalg.norm(features[:, None] - reference[None], axis=2)
    distances, rows = nearest(features, reference)
    np.testing.assert_allclose(distances, table.min(1), rtol=1e-6)
    np.testing.assert_array_equal(rows, table.argmin(1))
    queries = np.array([4, 2, 29])
    own, rows = nearest(reference[queries], reference, own=queries)
    table = np.linalg.norm(reference[:, None] - reference[None], axis=2) + np.diag(np.full(30, np.inf))
    np.testing.assert_allclose(own, table[queries].min(1), rtol=1e-6)
    np.testing.assert_array_equal(rows, table[queries].argmin(1))


def test_the_standard_error_is_the_spread_of_independent_sets():
    reference = Gaussian.of(sample(2000, 32, 0))

    def metric(features):
        return frechet_distance(features, reference)

    values = [metric(sample(200, 32, seed, 1.1)) for seed in range(1, 61)]
    errors = [standard_error(metric, sample(200, 32, seed, 1.1)) for seed in range(1, 21)]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_few_images_make_the_distance_too_high_and_extrapolation_corrects_it():
    """Two sets of one distribution, of which the true distance is 0."""
    reference = Gaussian.of(sample(20_000, 16, 0))

    def metric(features):
        return frechet_distance(features, reference)

    raw = np.mean([metric(sample(100, 16, seed)) for seed in range(1, 21)])
    better = np.mean([extrapolated(metric, sample(100, 16, seed)) for seed in range(1, 21)])
    assert abs(better) < raw / 4


def test_measure_returns_an_interval_around_the_value_and_the_counts():
    reference = sample(500, 8, 0)
    figures = measure(sample(100, 8, 1, 1.3), reference, Gaussian.of(reference), Manifold.of(reference))
    low, high = figures["interval_95"]
    assert low < figures["frechet_distance"] < high
    assert figures["extrapolated"] < figures["frechet_distance"]
    assert figures["num_samples"] == 100


def test_features_without_a_covariance_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        Gaussian.of(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        Gaussian.of(np.full((3, 3), np.nan))
