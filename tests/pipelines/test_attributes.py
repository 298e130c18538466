"""Requested attributes, in every spelling, and the condition ids that the model takes for them."""

import numpy as np
import pytest
from conftest import tiny_pipeline
from pipeline_calls import run


def test_attributes_in_all_spellings():
    pipeline = tiny_pipeline()
    assert pipeline.encode_attributes(None, 2).tolist() == [[2, 3], [2, 3]]
    rows = [{"Smiling": True, "class": "dog"}, {"class": 2, "Smiling": None}, {"Smiling": False}, {}]
    assert pipeline.encode_attributes(rows).tolist() == [[1, 1], [2, 2], [0, 3], [2, 3]]
    assert len(run(pipeline, rows)) == 4
    assert len(run(pipeline, {"Smiling": True}, batch_size=2, num_images_per_prompt=2)) == 4
    assert not np.array_equal(run(pipeline, {"Smiling": True}), run(pipeline, {"Smiling": False}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": {"Smilling": True}}, "valid names are Smiling, class"),
        ({"attributes": {"class": "cow"}}, "valid values are cat, dog, owl"),
        ({"attributes": {"class": 3}}, "between 0 and 2"),
        ({"attributes": {"Smiling": 0.9}}, "expected Smiling between 0 and 1, got 0.9"),
        ({"attributes": {"Smiling": [1]}}, r"expected Smiling between 0 and 1, got \[1\]"),
        ({"attributes": {"Smiling": float("nan")}}, "expected Smiling between 0 and 1, got nan"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be at least 1"),
        ({"attributes": [{}, {}], "batch_size": 3}, "2 rows"),
        ({"attributes": []}, "at least one"),
        ({"attributes": "Smiling"}, "expected a dict like"),
        ({"attributes": ["Smiling"]}, "expected a dict like"),
        ({"batch_size": 0}, "at least one"),
    ],
)
def test_invalid_attributes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**{"num_inference_steps": 1, **options})
