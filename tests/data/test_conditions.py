import contextlib

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Value

from dit_hf.data.conditions import infer_condition, remap_class_ids
from dit_hf.data.contents import Column


def infer(*values, requested=False, name="pet", **column):
    """Return ids, of which None is missing, and the feature, alike from a list and, where there is one, an array."""
    found = infer_condition(name, Column(list(values), **column), requested)
    with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError):  # values of several types
        array = infer_condition(name, Column(pa.array(values), **column), requested)
        assert str(array) == str(found)
    return found if isinstance(found, str) else ([None if i < 0 else i for i in found[0].tolist()], found[1])


def test_yes_and_no_in_every_spelling():
    assert infer(True, False, None) == ([1, 0, None], Value("int8"))
    for yes, no in (("yes", "NO"), ("1", "0"), (1.0, 0.0), ("True", "false"), ("1.0", "0.0"), (1, 0)):
        for missing in ("", "NA", "nan", float("nan"), None, "null", " None "):
            assert infer(yes, no, missing) == ([1, 0, None], Value("int8"))
    # -1 is no in CelebA's lists alone.
    assert infer("-1", "1", signed=True) == ([0, 1], Value("int8"))
    assert infer(-1, 1, -1, 1) == "2 values, -1 to 1 (--conditions reads them as classes)"
    assert infer(-1, 0, 1, requested=True) == ([0, 1, 2], ClassLabel(names=["-1", "0", "1"]))


def test_names_are_classes():
    assert infer("b", "a", "b", "a") == ([1, 0, 1, 0], ClassLabel(names=["a", "b"]))
    assert infer(*["001", "010", None] * 2) == ([0, 1, None] * 2, ClassLabel(names=["001", "010"]))
    assert infer(*["0", "1", "x"] * 2) == ([0, 1, 2] * 2, ClassLabel(names=["0", "1", "x"]))
    assert infer("one", "two", "three") == "3 different texts in 3 rows"
    assert infer("one", "two", "three", requested=True)[1] == ClassLabel(names=["one", "three", "two"])
    assert infer("a", "a", "a") == "always a"


@pytest.mark.parametrize("name", ["caption", "Text", "prompt"])
def test_captions_are_classes_only_if_requested(name):
    reason = "2 different texts (--conditions reads them as classes)"
    assert infer(*["cat", "dog"] * 4, name=name) == reason
    assert infer(*["a cat on a mat", "the dog of my aunt's neighbor"] * 4) == reason  # by their words
    for said in ({"requested": True}, {"declared": True}):
        assert infer(*["cat", "dog"] * 2, name=name, **said) == ([0, 1] * 2, ClassLabel(names=["cat", "dog"]))
    names = ["german shepherd dog", "golden retriever"]
    assert infer(*names * 2)[1] == ClassLabel(names=names)


def test_whole_numbers_are_classes_only_where_that_is_said():
    assert infer(*[0, 2, 1] * 2) == "3 values, 0 to 2 (--conditions reads them as classes)"
    for said in ({"requested": True}, {"declared": True}):
        assert infer(*[0, 2, 1] * 2, **said) == ([0, 2, 1] * 2, ClassLabel(num_classes=3))
        assert infer(*["10", "9", "2"] * 2, **said)[0] == [10, 9, 2] * 2
        assert infer(*[2019, 2021] * 2, **said) == ([0, 1] * 2, ClassLabel(names=["2019", "2021"]))
    assert infer("0", "1", declared=True) == ([0, 1], ClassLabel(num_classes=2))
    # The ids of classes with names, of which -1 is how the Hub spells a missing label.
    assert infer(1, None, -1, labels=["cat", "dog"]) == ([1, None, None], ClassLabel(names=["cat", "dog"]))


@pytest.mark.parametrize("requested", [False, True])
def test_what_is_never_a_condition(requested):
    assert infer(0.5, 1.0, requested=requested) == "numbers, 0.5 to 1"
    assert infer(None, "", requested=requested) == "no values"
    assert infer([1], [2], requested=requested) == "lists or structures"


def test_class_ids_follow_the_names_from_a_dataset_to_a_model():
    ids, animals = np.array([1, 0, 1]), ["cat", "dog", "owl"]
    assert remap_class_ids("class", ids, ["cat", "owl"], animals).tolist() == [2, 0, 2]
    # A class of which there is no image may be unknown to the model.
    assert remap_class_ids("class", ids, ["cat", "owl", "yak"], animals).tolist() == [2, 0, 2]
    assert remap_class_ids("class", np.array([1, -1]), ["cat", "owl"], animals).tolist() == [2, -1]
    with pytest.raises(ValueError, match="class='yak' is unknown to the model; valid names are cat, dog, owl"):
        remap_class_ids("class", ids, ["cat", "yak"], animals)


@pytest.mark.parametrize("names", [None, ["0", "1", "2", "3"], ["n02123045", "n02084071", "n01503061"]])
def test_class_ids_stay_if_the_names_say_nothing(names):
    ids = np.array([1, 0, 2])
    assert remap_class_ids("class", ids, names, ["cat", "dog", "owl"]).tolist() == [1, 0, 2]
