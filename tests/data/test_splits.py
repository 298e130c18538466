import hashlib

import numpy as np
import pytest
from celeba import save_image

from dit_hf.data.contents import SourceOptions
from dit_hf.data.sources import open_source
from dit_hf.data.splits import is_held_out, split_of_folder


def test_folders_are_splits_beside_metadata_too(tmp_path):
    for name in ("train/0.png", "train/1.png", "test/0.png"):
        save_image(tmp_path / name)
    for folder in ("train", "test"):
        (tmp_path / folder / "metadata.jsonl").write_text('{"file_name": "0.png", "size": 1}\n')
    with open(tmp_path / "train" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "1.png", "size": 0}\n')
    rows = open_source(str(tmp_path)).rows
    assert dict(zip(rows["id"], rows["split"], strict=True)) == {
        "test/0.png": "test",
        "train/0.png": "train",
        "train/1.png": "train",
    }
    assert rows["size"] == [1, 1, 0]
    assert open_source(str(tmp_path), SourceOptions(split="test")).rows["id"] == ["test/0.png"]
    # If some rows have a split, rows without one are left out.
    with open(tmp_path / "test" / "metadata.jsonl", "w") as file:
        file.write('{"file_name": "0.png", "size": 1, "split": "val"}\n')
    source = open_source(str(tmp_path))
    assert source.rows["split"] == ["validation"]
    assert dict(source.left_out) == dict.fromkeys(["train/0.png", "train/1.png"], "its row has no split")


HELD_OUT = ["195.jpg"]


def test_held_out_share_depends_on_the_id_alone():
    ids = [f"{i}.jpg" for i in range(20_000)]
    held_out = [is_held_out(i) for i in ids]
    assert 0.017 < np.mean(held_out) < 0.023
    # By the formula that every version has used: a cache that is extended must hold out the same images.
    first_bytes = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") for i in ids]
    assert held_out == [number / 2**64 < 0.02 for number in first_bytes]
    assert [i for i, held in zip(ids[:200], held_out, strict=False) if held] == HELD_OUT


def test_one_folder_named_like_a_split_is_ambiguous(tmp_path):
    for name in ("Training", "DEV", "eval"):
        save_image(tmp_path / "splits" / name / "a.png")
    assert open_source(str(tmp_path / "splits")).rows["split"] == ["validation", "train", "test"]
    for name in ("ship/a.png", "ship/b.png", "train/a.png", "train/b.png"):  # classes
        save_image(tmp_path / "vehicles" / name)
    with pytest.raises(ValueError, match="train/ is named like a split, ship/ beside it is not: --split_from folders"):
        open_source(str(tmp_path / "vehicles"))
    assert len(open_source(str(tmp_path / "vehicles"), SourceOptions(split_from="folders")).rows) == 2
    rows = open_source(str(tmp_path / "vehicles"), SourceOptions(split_from="none")).rows
    assert "split" not in rows.column_names
    assert rows.features["class"].names == ["ship", "train"]


def test_words_beside_a_split_make_a_folder_a_class():
    for name in ("train", "Train2017", "test_set", "images-val", "valid.1"):
        assert split_of_folder(name)
    for name in ("freight_train", "crash_test", "dev_board", "trainval", "train_val"):
        assert split_of_folder(name) is None
