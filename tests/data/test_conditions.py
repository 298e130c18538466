import numpy as np
import pytest
from datasets import ClassLabel, Value

from dit_hf.data.conditions import infer_condition, remap_class_ids


def test_columns_that_can_be_conditions():
    assert infer_condition([True, False, None]) == ([1, 0, -1], Value("int8"))
    assert infer_condition(["-1", "1", ""]) == ([0, 1, -1], Value("int8"))
    assert infer_condition([0, 2, 1] * 2)[1] == ClassLabel(num_classes=3)
    assert infer_condition(["b", "a", "b", "a"]) == ([1, 0, 1, 0], ClassLabel(names=["a", "b"]))
    assert infer_condition(["10", "9", "2"] * 2)[0] == [10, 9, 2] * 2
    assert infer_condition(["001", "010", None] * 2) == ([0, 1, -1] * 2, ClassLabel(names=["001", "010"]))
    assert infer_condition([2019, 2021] * 2) == ([0, 1] * 2, ClassLabel(names=["2019", "2021"]))
    assert infer_condition(["0", "1", "x"] * 2) == ([0, 1, 2] * 2, ClassLabel(names=["0", "1", "x"]))
    assert infer_condition(list(range(20))) is None  # running numbers
    assert infer_condition([-1, 2] * 2) is None
    assert infer_condition(["one", "two", "three"]) is None  # free text
    assert infer_condition([0.5, 1.0]) is None
    assert infer_condition([1, 10177]) is None
    assert infer_condition([None, None]) is None


def test_class_ids_follow_the_names_from_a_dataset_to_a_model():
    ids, animals = np.array([1, 0, 1]), ["cat", "dog", "owl"]
    assert remap_class_ids("class", ids, ["cat", "owl"], animals).tolist() == [2, 0, 2]
    # A class of which there is no image may be unknown to the model.
    assert remap_class_ids("class", ids, ["cat", "owl", "yak"], animals).tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match="class='yak' is unknown to the model; valid names are cat, dog, owl"):
        remap_class_ids("class", ids, ["cat", "yak"], animals)


@pytest.mark.parametrize("names", [None, ["0", "1", "2", "3"], ["n02123045", "n02084071", "n01503061"]])
def test_class_ids_stay_if_the_names_say_nothing(names):
    ids = np.array([1, 0, 2])
    assert remap_class_ids("class", ids, names, ["cat", "dog", "owl"]).tolist() == [1, 0, 2]
