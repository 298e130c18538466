import json

import pytest
from layouts import classes, read, write


def test_the_dataset_json_of_stylegan_and_edm(tmp_path):
    names = [f"{i // 4:05}/img{i:08}.png" for i in range(12)]
    write(tmp_path, *names)
    labels = [[name, i % 3] for i, name in enumerate(names)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert classes(read(tmp_path)) == {name: str(i % 3) for i, name in enumerate(names)}
    # Their tools write null if the images have no labels; the folders are blocks of images all the same.
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert read(tmp_path).plan.conditions == {}
    (tmp_path / "dataset.json").write_text('{"images": 3}')
    with pytest.raises(ValueError, match=r"dataset.json cannot be read; expected"):
        read(tmp_path)


def test_imagenet_as_kaggle_ships_it(tmp_path):
    place = "ILSVRC/Data/CLS-LOC"
    write(tmp_path, f"{place}/train/n01*2", f"{place}/train/n02*2", f"{place}/val*2", f"{place}/test*1")
    lines = ["ImageId,PredictionString", "0,n02 1 2 3 4 n02 5 6 7 8 ", "1,n01 1 2 3 4 "]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    source = read(tmp_path)
    assert source.plan.counts == {"train": 4, "validation": 2, "test": 1}
    by_id = classes(source)
    assert (by_id[f"{place}/val/0.png"], by_id[f"{place}/val/1.png"]) == ("n02", "n01")
    assert by_id[f"{place}/train/n01/0.png"] == "n01"
    assert by_id[f"{place}/test/0.png"] is None


def test_tiny_imagenet(tmp_path):
    write(tmp_path, "train/n01/images*2", "train/n02/images*2", "val/images*2", "test/images*1")
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\tn02\t0\t0\t9\t9\n1.png\tn01\t0\t0\t9\t9\n")
    source = read(tmp_path)
    assert source.plan.conditions == {
        "class": "2 classes: n01 3, n02 3; 1 without a value (folder and val_annotations.txt)"
    }
    assert classes(source)["val/images/0.png"] == "n02"


def test_lists_of_the_images_that_are_not_read_are_named(tmp_path):
    write(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "labels.csv").write_text("image,label\na.png,1\nb.png,0\n")
    (tmp_path / "list.txt").write_text("a 1\nb 0\nc 0\n")
    (tmp_path / "boxes.json").write_text(json.dumps({"images": [{"file_name": "a.png"}, {"file_name": "x/b.png"}]}))
    (tmp_path / "notes.txt").write_text("hello\nworld\n")
    (tmp_path / "a.txt").write_text("a.png\nb.png\n")  # a caption
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    unused = read(tmp_path).plan.contents.unused
    lists = "lists images, but only metadata.csv (file_name, ...) is read"
    assert {name: unused.get(name) for name in ("labels.csv", "list.txt", "boxes.json")} == dict.fromkeys(
        ("labels.csv", "list.txt", "boxes.json"), lists
    )
    assert unused["table.xlsx"].startswith("a spreadsheet, but only metadata.csv")
    assert not {"notes.txt", "a.txt"} & unused.keys()
    assert unused["files"] == "1 .csv, 1 .json, 3 .txt, 1 .xlsx"
