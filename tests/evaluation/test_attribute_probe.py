"""The attribute head, on synthetic features that contain the attributes by construction."""

import numpy as np
import pytest

from dit_hf.evaluation.attribute_probe import train_head


def synthetic_features(count, seed):
    """Features in which one dimension encodes a yes/no attribute, two encode one of three classes, the rest noise."""
    rng = np.random.default_rng(seed)
    yes, kind = rng.integers(0, 2, count), rng.integers(0, 3, count)
    features = rng.normal(size=(count, 12)).astype(np.float32) * 3 + 5
    features[:, 0] = yes * 4 + 0.3 * features[:, 0]
    features[:, 1:3] = np.stack([kind == 1, kind == 2], 1) * 6 + 0.3 * features[:, 1:3]
    return features, {"yes": yes, "kind": kind}


def rows_of(conditions):
    return [dict(zip(conditions, row, strict=True)) for row in zip(*conditions.values(), strict=True)]


def test_the_head_learns_the_attributes_and_accuracy_counts_the_matching_ones():
    head = train_head(*synthetic_features(1500, 0))
    assert min(head.held_out.values()) > 0.9
    features, conditions = synthetic_features(600, 1)
    matching = head.accuracy(features, rows_of(conditions))
    assert matching["accuracy"] == pytest.approx(matching["accuracy_on_real"], abs=0.05)
    # Attributes of other images are matched by chance only.
    unrelated = head.accuracy(features, rows_of(synthetic_features(600, 2)[1]))
    assert unrelated["by_attribute"]["yes"]["drawn"] == pytest.approx(1 / 2, abs=0.08)
    assert unrelated["by_attribute"]["kind"]["drawn"] == pytest.approx(1 / 3, abs=0.08)


def test_balanced_accuracy_gives_no_credit_for_the_frequent_value():
    features, conditions = synthetic_features(1500, 0)
    head = train_head(features, conditions)
    # 5 % of the images were requested with the attribute, none shows it.
    requested = np.arange(200) < 10
    others, other_conditions = synthetic_features(2000, 3)
    without = others[other_conditions["yes"] == 0][:200]
    accuracy = head.accuracy(without, [{"yes": int(value)} for value in requested])
    assert accuracy["accuracy"] > 0.85
    assert accuracy["balanced_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_training_a_head_is_deterministic():
    features, conditions = synthetic_features(300, 0)
    assert train_head(features, conditions).held_out == train_head(features, conditions).held_out


def test_images_without_a_value_neither_train_the_head_nor_count():
    features, conditions = synthetic_features(1500, 0)
    some = np.random.default_rng(4).random(1500) < 0.5
    unlabelled = {"yes": np.where(some, conditions["yes"], -1), "kind": conditions["kind"], "never": np.full(1500, -1)}
    head = train_head(features, unlabelled)
    assert head.held_out["yes"] > 0.9
    assert head.held_out["never"] == 0
    features, conditions = synthetic_features(600, 1)
    rows = rows_of(conditions)
    for row, has_value in zip(rows, np.arange(600) < 200, strict=True):
        if not has_value:
            row["yes"] = 1 - row["yes"]  # wrong, but for the first 200
    wrong = head.accuracy(features, rows)["by_attribute"]["yes"]["drawn"]
    for row in rows[200:]:
        del row["yes"]
    accuracy = head.accuracy(features, rows)
    assert wrong < 0.5 < 0.9 < accuracy["by_attribute"]["yes"]["drawn"]
    assert "never" not in accuracy["by_attribute"]
