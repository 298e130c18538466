"""Layouts of folders that were misread in silence, in other projects or in this one."""

import pytest
from layouts import classes, read, write


def test_classes_in_one_split_and_flat_images_in_the_others(tmp_path):
    write(tmp_path, "train/cat*3", "train/dog*3", "val*2", "test*2")
    source = read(tmp_path)
    assert source.plan.counts == {"train": 6, "validation": 2, "test": 2}
    assert source.plan.conditions == {"class": "2 classes: cat 3, dog 3; 4 without a value (folder)"}
    assert classes(source)["val/0.png"] is None
    train = read(tmp_path, split="train")
    assert train.plan.conditions == {"class": "2 classes: cat 3, dog 3 (folder)"}
    assert len(read(tmp_path, missing="leave_out").rows) == 6


def test_splits_below_the_classes(tmp_path):
    write(tmp_path, "cat/train*3", "cat/test*2", "dog/train*3", "dog/test*2")
    source = read(tmp_path)
    assert source.plan.counts == {"train": 6, "test": 4}
    assert set(classes(source).values()) == {"cat", "dog"}
    assert classes(source)["dog/test/0.png"] == "dog"


def test_one_image_beside_the_folders_of_classes_has_no_class(tmp_path):
    write(tmp_path, "cat*3", "dog*3", "overview.png")
    assert classes(read(tmp_path))["overview.png"] is None
    assert list(classes(read(tmp_path)).values()).count("cat") == 3


def test_a_folder_beside_those_of_splits_is_not_read(tmp_path):
    write(tmp_path, "train/cat*2", "train/dog*2", "val/cat*1", "val/dog*1", "unlabeled/owl*3", "stray.png")
    source = read(tmp_path)
    assert source.plan.counts == {"train": 4, "validation": 2}
    assert source.plan.contents.unused == {
        "folder unlabeled/ (3 images)": "names no split (--split_from none reads them too)",
        "1 image beside the splits": "names no split (--split_from none reads them too)",
    }
    assert read(tmp_path, split_from="none").plan.counts == {"train": 10}


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("training_set", "test-set"), ("Train", "valid")])
def test_splits_with_other_words_in_their_names_as_datasets_reads_them(tmp_path, names):
    write(tmp_path, *(f"{name}/{label}*2" for name in names for label in ("a", "b")))
    source = read(tmp_path)
    assert len(source.plan.counts) == 2
    assert source.plan.counts["train"] == 4
    assert set(classes(source).values()) == {"a", "b"}


def test_file_names_are_splits_only_if_all_of_them_are(tmp_path):
    write(tmp_path, "train_0.png", "train_1.png", "test_0.png")
    assert read(tmp_path).plan.counts == {"train": 2, "test": 1}
    assert read(tmp_path, split_from="none").plan.counts == {"train": 3}
    write(tmp_path, "other.png")
    assert read(tmp_path).plan.counts == {"train": 4}
    assert read(tmp_path, split_from="files").plan.counts == {"train": 2, "test": 1}
    with pytest.raises(ValueError, match="no folder is named like a split"):
        read(tmp_path, split_from="folders")


@pytest.mark.parametrize("names", [("00000", "01000", "02000"), ("00000", "00001", "00002")])
def test_blocks_of_images_are_no_classes_unless_that_is_requested(tmp_path, names):
    write(tmp_path, *(f"{name}*2" for name in names))
    source = read(tmp_path)
    assert source.plan.conditions == {}
    assert "blocks of images" in source.plan.contents.choices[0]
    assert set(classes(read(tmp_path, conditions=["class"])).values()) == {*names}


def test_a_level_that_all_images_share_says_nothing(tmp_path):
    write(tmp_path, "data/raw/cat/images*2", "data/raw/dog/images*2")
    assert set(classes(read(tmp_path)).values()) == {"cat", "dog"}
    write(tmp_path / "one", "faces*3")
    assert read(tmp_path / "one").plan.conditions == {}


def test_num_images_takes_training_images_of_every_class(tmp_path):
    write(tmp_path, "train/cat*9", "train/dog*3", "test/cat*9")
    source = read(tmp_path, num_images=6)
    assert source.plan.counts == {"train": 6}
    assert sorted(classes(source).values()) == ["cat"] * 3 + ["dog"] * 3
    assert source.plan.contents.choices == [
        "--num_images takes 6 of 12 train images, spread over 2 classes and folders"
    ]
    assert read(tmp_path, num_images=6).rows["id"] == source.rows["id"]
    assert read(tmp_path, num_images=6, seed=1).rows["id"] != source.rows["id"]
    assert read(tmp_path, num_images=2, split="test").plan.counts == {"test": 2}
