"""The head that looks for attributes, and the search for memorised images, on features whose answers are known."""

import numpy as np
import pytest

from dit_hf.evaluation.attribute_probe import train_head
from dit_hf.evaluation.memorization import describe_pairs, find_neighbours, make_pairs_grid


def pictures(count, seed):
    """Features of which one says yes or no, two say which of three classes, and the rest nothing."""
    rng = np.random.default_rng(seed)
    yes, kind = rng.integers(0, 2, count), rng.integers(0, 3, count)
    features = rng.normal(size=(count, 12)).astype(np.float32) * 3 + 5
    features[:, 0] = yes * 4 + 0.3 * features[:, 0]
    features[:, 1:3] = np.stack([kind == 1, kind == 2], 1) * 6 + 0.3 * features[:, 1:3]
    return features, {"yes": yes, "kind": kind}


def rows_of(conditions):
    return [dict(zip(conditions, row, strict=True)) for row in zip(*conditions.values(), strict=True)]


def test_the_head_learns_what_features_say_and_accuracy_is_what_was_obeyed():
    head = train_head(*pictures(1500, 0))
    assert min(head.held_out.values()) > 0.9
    features, conditions = pictures(600, 1)
    obedient = head.accuracy(features, rows_of(conditions))
    assert obedient["accuracy"] == pytest.approx(obedient["accuracy_on_real"], abs=0.05)
    disobedient = head.accuracy(features, rows_of(pictures(600, 2)[1]))
    assert disobedient["by_attribute"]["yes"]["drawn"] == pytest.approx(1 / 2, abs=0.08)
    assert disobedient["by_attribute"]["kind"]["drawn"] == pytest.approx(1 / 3, abs=0.08)


def test_balanced_accuracy_gives_nothing_for_what_is_frequent():
    features, conditions = pictures(1500, 0)
    head = train_head(features, conditions)
    rare = np.arange(200) < 10
    never = pictures(2000, 3)
    shown = never[0][never[1]["yes"] == 0][:200]
    found = head.accuracy(shown, [{"yes": int(value)} for value in rare])
    assert found["accuracy"] > 0.85
    assert found["balanced_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_training_a_head_repeats_itself():
    features, conditions = pictures(300, 0)
    assert train_head(features, conditions).held_out == train_head(features, conditions).held_out


def test_new_pictures_are_as_far_as_real_ones_and_copies_are_found():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(2000, 6))
    new = find_neighbours(rng.normal(size=(1000, 6)), real).figures()
    assert new["share_within_closest_1_percent"] < 0.03
    assert new["share_within_closest_half"] == pytest.approx(0.5, abs=0.06)
    copied = rng.normal(size=(1000, 6))
    copied[:300] = real[100:400] + 1e-4
    found = find_neighbours(copied, real)
    assert found.figures()["share_within_closest_1_percent"] == pytest.approx(0.3, abs=0.03)
    assert set(found.closest()) <= set(range(300))
    for pair in describe_pairs(found):
        assert pair["real"] == pair["sample"] + 100


def test_the_sheet_has_each_sample_beside_its_neighbour():
    drawn, real = np.zeros((4, 96, 96, 3), np.uint8), np.full((4, 96, 96, 3), 200, np.uint8)
    sheet = np.asarray(make_pairs_grid(drawn, real, np.arange(4.0)))
    middle = sheet[28 + 48, 48 :: 96 + 6][:8]
    assert [int(pixel[0]) for pixel in middle] == [0, 200] * 4
