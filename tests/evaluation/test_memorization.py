"""The search for memorized images, on features with known neighbours."""

import numpy as np
import pytest

from dit_hf.evaluation.memorization import describe_pairs, find_neighbours, make_pairs_grid


def test_new_images_are_as_far_as_real_ones_and_copies_are_detected():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(2000, 6))
    new = find_neighbours(rng.normal(size=(1000, 6)), real).figures()
    assert new["share_within_closest_1_percent"] < 0.03
    assert new["share_within_closest_half"] == pytest.approx(0.5, abs=0.06)
    # The first 300 of these samples are copies.
    samples = rng.normal(size=(1000, 6))
    samples[:300] = real[100:400] + 1e-4
    neighbours = find_neighbours(samples, real)
    assert neighbours.figures()["share_within_closest_1_percent"] == pytest.approx(0.3, abs=0.03)
    assert set(neighbours.closest()) <= set(range(300))
    for pair in describe_pairs(neighbours):
        assert pair["real"] == pair["sample"] + 100


def test_the_grid_shows_each_sample_beside_its_neighbour():
    samples, real = np.zeros((4, 96, 96, 3), np.uint8), np.full((4, 96, 96, 3), 200, np.uint8)
    grid = np.asarray(make_pairs_grid(samples, real, np.arange(4.0)))
    centers = grid[28 + 48, 48 :: 96 + 6][:8]
    assert [int(pixel[0]) for pixel in centers] == [0, 200] * 4
