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


def test_a_folder_below_those_of_two_splits_is_not_trained_on_in_silence(tmp_path):
    write(tmp_path, "train/cat*3", "train/dog*3", "train/val/cat*2", "train/val/dog*2")
    for conditions in (None, ["class"]):
        with pytest.raises(ValueError, match="train/val/cat/ names train and validation: --split_from folders"):
            read(tmp_path, conditions=conditions)
    source = read(tmp_path, split_from="folders")
    assert source.plan.counts == {"train": 6, "validation": 4}
    assert source.plan.conditions == {"class": "2 classes: cat 5, dog 5 (folder)"}
    assert read(tmp_path, split_from="none").plan.counts == {"train": 10}


def test_folds_are_refused_where_each_has_splits_and_are_no_classes_otherwise(tmp_path):
    write(tmp_path / "cv", *(f"fold_{i}/{split}/{c}*1" for i in (1, 2) for split in ("train", "val") for c in "ab"))
    with pytest.raises(ValueError, match=r"fold_1/, fold_2/ are folds, each with splits of its own: name one"):
        read(tmp_path / "cv")
    assert read(tmp_path / "cv" / "fold_1").plan.counts == {"train": 2, "validation": 2}
    assert read(tmp_path / "cv", split_from="folders").plan.counts == {"train": 4, "validation": 4}
    write(tmp_path / "parts", "images_001/images*2", "images_002/images*2")
    source = read(tmp_path / "parts")
    assert source.plan.conditions == {}
    assert "images_001 to images_002 are blocks of images" in source.plan.contents.choices[0]


def test_folders_that_say_more_than_a_split(tmp_path):
    write(tmp_path / "gan", "trainA*3", "trainB*2", "testA*2", "testB*2")
    with pytest.raises(ValueError, match="testA/, testB/, trainA/, trainB/ name splits beside other words"):
        read(tmp_path / "gan")
    source = read(tmp_path / "gan", split_from="folders")
    assert source.plan.counts == {"train": 5, "test": 4}
    assert source.plan.conditions == {"class": "2 classes: A 5, B 4 (folder)"}
    assert "4 classes: testA 2" in read(tmp_path / "gan", split_from="none").plan.conditions["class"]
    write(tmp_path / "cars", "crash_test*2", "parade*2")
    source = read(tmp_path / "cars")
    assert set(classes(source).values()) == {"crash_test", "parade"}
    assert source.plan.contents.choices == ["crash_test/: no split (--split_from folders reads it as one)"]


def test_images_beside_held_out_folders_alone(tmp_path):
    write(tmp_path / "all", "cat*3", "dog*3", "cat/val*2", "dog/val*2")
    with pytest.raises(ValueError, match="--split_from folders reads the latter as training images"):
        read(tmp_path / "all")
    source = read(tmp_path / "all", split_from="folders")
    assert source.plan.counts == {"train": 6, "validation": 4}
    assert source.plan.conditions == {"class": "2 classes: cat 5, dog 5 (folder)"}
    write(tmp_path / "held", "val*2")
    assert read(tmp_path / "held").plan.contents.choices == [
        "no training images (--split_from none reads all as training images)"
    ]


def test_folders_of_one_name_in_several_others_are_not_merged_in_silence(tmp_path):
    write(tmp_path, "cat/tabby*2", "cat/other*2", "dog/pug*2", "dog/other*2")
    with pytest.raises(ValueError, match="folders called other lie in cat/, dog/: --conditions class"):
        read(tmp_path)
    by_first = read(tmp_path, conditions=["folder_1"])
    assert by_first.plan.conditions == {"folder_1": "2 classes: cat 4, dog 4 (folder)"}
    both = read(tmp_path, conditions=["folder_1", "class"])
    assert both.plan.conditions["class"] == "3 classes: other 4, pug 2, tabby 2 (folder)"
    assert classes(both, "folder_1")["dog/other/0.png"] == "dog"


def test_folders_above_the_class_are_named(tmp_path):
    write(tmp_path, "animal/cat*2", "animal/dog*2", "vehicle/car*2")
    source = read(tmp_path)
    assert set(classes(source).values()) == {"cat", "dog", "car"}
    assert source.plan.contents.unused == {
        "folders animal/, vehicle/": "the last folder is the class (--conditions folder_1 takes the first)"
    }


def test_images_named_like_a_split_among_others_are_named(tmp_path):
    write(tmp_path, "cat/1.png", "cat/test_1.png", "dog/1.png")
    assert read(tmp_path).plan.contents.choices == [
        "named like a split, but training images: 1 image, first cat/test_1.png (--split_from files)"
    ]
